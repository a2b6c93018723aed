// The test module `_cuda_emulation`: the CUDA part of `seqkernels._native`, executed on the host.
#include "bindings/bindings.h"
#include "host_emulation/launchers.h"

PYBIND11_MODULE(_cuda_emulation, m) {
  using namespace seqkernels;
  using host_emulation::launch_settings;
  namespace py = pybind11;
  bind_cuda(m);
  m.def(
      "set_schedule",
      [](const std::string& order, uint64_t seed) {
        using Order = host_emulation::Schedule::Order;
        if (order != "forward" && order != "reverse" && order != "random") {
          throw std::invalid_argument(
              "set_schedule: order: expected forward, reverse or random, got '" + order + "'");
        }
        launch_settings().schedule.order = order == "forward"   ? Order::kForward
                                           : order == "reverse" ? Order::kReverse
                                                                : Order::kRandom;
        launch_settings().schedule.seed = seed;
      },
      py::arg("order"), py::arg("seed") = 0, "The order of blocks, warps and lanes.");
  m.def(
      "set_device",
      [](int64_t shared_bytes, int multiprocessors) {
        launch_settings().device = {shared_bytes, multiprocessors};
      },
      py::arg("shared_bytes"), py::arg("multiprocessors"), "What the launchers take it to be.");
  m.def("launches", [] { return launch_settings().launches; }, "Launches without a fault.");
}

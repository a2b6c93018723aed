// The test module `_cuda_emulation`: the ops on a CUDA device, executed on the host. They are those
// of `torch.ops.seqkernels_emulated`.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>

#include "bindings/cuda.h"
#include "host_emulation/launchers.h"
#include "seqkernels/library.h"

PYBIND11_MODULE(_cuda_emulation, m) {
  using namespace seqkernels;
  using host_emulation::launch_settings;
  namespace py = pybind11;
  m.def("ops_error", &ops_error,
        "Why the ops are not registered with torch, empty where they are.");
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
  m.def(
      "last_launch",
      [] {
        const host_emulation::LaunchSettings& s = launch_settings();
        const host_emulation::Counters& n = s.counters;
        return std::map<std::string, int64_t>{
            {"grid", s.grid},
            {"threads", s.threads},
            {"shared_bytes", s.shared_bytes},
            {"mma_m16n8k16", n.mma_m16n8k16},
            {"mma_m16n8k8", n.mma_m16n8k8},
            {"ldmatrix", n.ldmatrix},
            {"barriers", n.barriers},
            {"exp2", n.exp2},
            {"rsqrt", n.rsqrt},
            {"reciprocals", n.reciprocals},
            {"shared_loads", n.shared_loads},
            {"shared_stores", n.shared_stores},
            {"shared_wavefronts", n.shared_wavefronts},
            {"shared_conflicts", n.shared_conflicts()},
            {"global_load_sectors", n.global_load_sectors},
            {"global_store_sectors", n.global_store_sectors},
            {"dram_load_bytes", n.dram_load_bytes},
            {"dram_store_bytes", n.dram_store_bytes},
        };
      },
      "Sizes and counters of the last launch.");
}

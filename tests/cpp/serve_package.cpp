// Serves a package of AOTInductor without Python:
//
//   serve_package libseqkernels.so model.pt2 x.bin mask.bin B L E out.bin
//
// x [B, L, E] fp32, mask [B, L] bool, both raw; writes the first output, raw.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

namespace {

std::vector<char> bytes_of(const char* path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

}  // namespace

int main(int, char** argv) {
  if (!dlopen(argv[1], RTLD_NOW)) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  std::vector<char> x = bytes_of(argv[3]), mask = bytes_of(argv[4]);
  const int64_t b = std::stoll(argv[5]), l = std::stoll(argv[6]), e = std::stoll(argv[7]);
  torch::inductor::AOTIModelPackageLoader model(argv[2]);
  const std::vector<at::Tensor> out = model.run({at::from_blob(x.data(), {b, l, e}, at::kFloat),
                                                 at::from_blob(mask.data(), {b, l}, at::kBool)});
  const at::Tensor y = out[0].contiguous();
  std::ofstream(argv[8], std::ios::binary)
      .write(static_cast<const char*>(y.data_ptr()), static_cast<std::streamsize>(y.nbytes()));
  return 0;
}

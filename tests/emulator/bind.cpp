// The ops of csrc/cuda, run by the emulator, with the names and arguments that csrc/bind.cpp gives them. Its module as a
// whole becomes a template that nobody instantiates, because it holds the CPU backend too.
#include <pybind11/pybind11.h>

#pragma push_macro("PYBIND11_MODULE")
#undef PYBIND11_MODULE
#define PYBIND11_MODULE(name, module) template <class Module> void whole(Module module)
#include "../../csrc/bind.cpp"
#pragma pop_macro("PYBIND11_MODULE")

#include "../../csrc/cuda/run.h"

PYBIND11_MODULE(_emulated, m) {
  bind_ops(m, [](const auto& op, int64_t stream) { commopt::cuda::run(op, reinterpret_cast<cudaStream_t>(stream)); });
  m.def("topk_workspace", &commopt::cuda::topk_workspace);
  m.def("threshold_workspace", &commopt::cuda::threshold_workspace);
}

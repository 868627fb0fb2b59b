#include "inflate.h"

#include <pybind11/pybind11.h>

namespace fastcell::cuda {

std::string inflate(const char* compressed, std::size_t bytes) {
  namespace py = pybind11;
  const py::gil_scoped_acquire hold;
  const py::object unpacked =
      py::module_::import("lzma").attr("decompress")(py::bytes(compressed, bytes));
  return unpacked.cast<std::string>();
}

}  // namespace fastcell::cuda

# CUDA kernels without a CUDA toolkit: NVRTC out of a package of pip compiles them here and now, for
# every architecture; the runtime is linked statically, and finds the driver when it is first asked.
# csrc/cuda/toolkit.py says where the parts are, compile.py does the compiling.

set(FASTCELL_CUDA AUTO CACHE STRING "CUDA kernels: ON, OFF, or AUTO (if there is what builds them)")
set_property(CACHE FASTCELL_CUDA PROPERTY STRINGS AUTO ON OFF)
# Machine code runs on later chips of the same major number (not that of 90a, which has instructions
# of that chip alone); PTX on every later chip, compiled by its driver. Of PTX one kind, since a
# second would be as large as an architecture: 100, not 120, because 110 has no machine code here
# and is less than 120; all that 120 has beyond it is not used.
set(FASTCELL_CUDA_ARCHITECTURES sm_75 sm_80 sm_86 sm_89 sm_90a sm_100 sm_120 compute_100
    CACHE STRING "Architectures to compile CUDA kernels for")

function(fastcell_cuda_toolkit)
  set(FASTCELL_CUDA_TOOLKIT_FOUND FALSE PARENT_SCOPE)
  if(NOT CMAKE_SYSTEM_NAME STREQUAL "Linux"
     OR NOT CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|aarch64|arm64)$")
    set(FASTCELL_CUDA_WHY_NOT "not on ${CMAKE_SYSTEM_NAME} ${CMAKE_SYSTEM_PROCESSOR}" PARENT_SCOPE)
    return()
  endif()
  execute_process(
    COMMAND ${Python_EXECUTABLE} -B ${PROJECT_SOURCE_DIR}/csrc/cuda/toolkit.py
    RESULT_VARIABLE status OUTPUT_VARIABLE found ERROR_VARIABLE why
    OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_STRIP_TRAILING_WHITESPACE)
  if(NOT status EQUAL 0)
    set(FASTCELL_CUDA_WHY_NOT "${why}" PARENT_SCOPE)
    return()
  endif()
  set(FASTCELL_CUDA_TOOLKIT_FOUND TRUE PARENT_SCOPE)
  foreach(name NVRTC COMPILER RUNTIME LIBRARY INCLUDES)
    string(REGEX MATCH "(^|\n)${name}=([^\n]*)" line "${found}")
    set(FASTCELL_CUDA_${name} "${CMAKE_MATCH_2}" PARENT_SCOPE)
  endforeach()
endfunction()

function(fastcell_cuda target)
  set(folder ${CMAKE_CURRENT_BINARY_DIR}/cuda)
  set(source ${PROJECT_SOURCE_DIR}/csrc)
  # Too many are named here; compile.py looks which of them a kernel includes.
  file(GLOB inputs CONFIGURE_DEPENDS ${source}/cuda/*.cu ${source}/cuda/*.h ${source}/cuda/*.py
       ${source}/cells/*.h ${source}/common/*.h)
  string(REPLACE ";" "," architectures "${FASTCELL_CUDA_ARCHITECTURES}")
  add_custom_command(
    OUTPUT ${folder}/embedded.cpp
    BYPRODUCTS ${folder}/report.json
    COMMAND ${Python_EXECUTABLE} -B ${source}/cuda/compile.py --nvrtc ${FASTCELL_CUDA_NVRTC}
            --architectures ${architectures} --output ${folder}
            $<$<BOOL:${FASTCELL_WERROR}>:--werror>
    DEPENDS ${inputs} ${FASTCELL_CUDA_NVRTC}
    COMMENT "CUDA kernels for ${architectures}"
    VERBATIM COMMAND_EXPAND_LISTS)
  add_library(cuda_host OBJECT ${folder}/embedded.cpp ${source}/cuda/gpu_nvidia.cpp)
  target_include_directories(cuda_host PRIVATE ${source})
  target_include_directories(cuda_host SYSTEM PRIVATE ${FASTCELL_CUDA_INCLUDES})

  target_sources(${target} PRIVATE $<TARGET_OBJECTS:cuda_host> ${source}/cuda/inflate.cpp)
  target_compile_definitions(${target} PRIVATE FASTCELL_HAVE_CUDA)
  target_include_directories(${target} SYSTEM PRIVATE ${FASTCELL_CUDA_INCLUDES})
  target_link_libraries(${target} PRIVATE ${FASTCELL_CUDA_LIBRARY} dl rt pthread)
  # The runtime's symbols stay inside: torch has a runtime of its own, maybe of another version.
  file(WRITE ${folder}/exports "{ global: PyInit_*; local: *; };\n")
  target_link_options(${target} PRIVATE LINKER:--version-script=${folder}/exports)
endfunction()

# Above gpu.h all is the same with CUDA and without.
target_sources(_core PRIVATE csrc/cuda/bindings.cpp csrc/cuda/build_info.cpp
               csrc/cuda/normed_bindings.cpp csrc/cuda/normed_run.cpp csrc/cuda/plan.cpp
               csrc/cuda/run.cpp csrc/cuda/tree_bindings.cpp csrc/cuda/tree_run.cpp)
if(FASTCELL_CUDA)
  fastcell_cuda_toolkit()
endif()
if(FASTCELL_CUDA AND FASTCELL_CUDA_TOOLKIT_FOUND)
  message(STATUS "CUDA kernels: NVRTC ${FASTCELL_CUDA_COMPILER} (${FASTCELL_CUDA_NVRTC}), "
                 "runtime ${FASTCELL_CUDA_RUNTIME}")
  fastcell_cuda(_core)
else()
  target_sources(_core PRIVATE csrc/cuda/gpu_absent.cpp)
  if(NOT FASTCELL_CUDA)
    message(STATUS "CUDA kernels: left out, as FASTCELL_CUDA says")
  elseif(FASTCELL_CUDA STREQUAL "AUTO")
    string(REPLACE "\n" "; " why "${FASTCELL_CUDA_WHY_NOT}")
    message(STATUS "CUDA kernels: left out (${why})")
  else()
    message(FATAL_ERROR
            "FASTCELL_CUDA is ${FASTCELL_CUDA}, but what compiles CUDA kernels is not there:\n"
            "${FASTCELL_CUDA_WHY_NOT}\n"
            "pip install nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12 nvidia-cuda-nvcc-cu12 "
            "is enough")
  endif()
endif()

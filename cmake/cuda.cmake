# How the CUDA kernels are compiled: pyconv_cuda, a static library of ${CUDA_SOURCES}, and what links with it.
#
# Commands instead of CMake's CUDA language: it would test the compiler at each first configuration, and link with nvcc,
# which adds code for an architecture of its own choice.
set(PYCONV_CUDA_ARCHS "" CACHE STRING "Architectures, \"80;90+PTX\" for example, or \"native\" (default: 80;90;100;120+PTX)")
set(PYCONV_NVCC "" CACHE FILEPATH "The CUDA compiler (default: from CUDACXX, CUDA_HOME, PATH, /usr/local/cuda)")

execute_process(
  COMMAND "${PYCONV_PYTHON}" "${CMAKE_SOURCE_DIR}/cmake/cuda_facts.py" "${PYCONV_CUDA_ARCHS}" "${PYCONV_NVCC}"
  OUTPUT_VARIABLE cuda_facts RESULT_VARIABLE cuda_facts_failed ERROR_VARIABLE cuda_facts_error)
if(cuda_facts_failed)
  message(FATAL_ERROR "${cuda_facts_error}")
endif()
list(POP_FRONT cuda_facts CUDA_NVCC CUDA_STATIC_RUNTIME cuda_architectures)
set(CUDA_INCLUDE_DIRECTORIES ${cuda_facts})
message(STATUS "CUDA for ${cuda_architectures} by ${CUDA_NVCC}")

set(CUDA_FLAGS
  -std=c++17 -O3 -DNDEBUG --threads 2
  -ccbin "${CMAKE_CXX_COMPILER}"
  -I "${CMAKE_SOURCE_DIR}/cuda" -I "${CMAKE_SOURCE_DIR}/csrc"
  -Xptxas --warn-on-spills,--warn-on-local-memory-usage
  -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra)
if(PYCONV_CUDA_CHECK)
  # A kernel that spills registers or indexes an array in local memory is a mistake. Another release of the compiler may
  # see that differently, which is no reason to refuse a user's build.
  list(APPEND CUDA_FLAGS -Werror all-warnings -Xptxas -Werror)
endif()
string(REPLACE "," ";" cuda_architectures "${cuda_architectures}")
foreach(architecture ${cuda_architectures})
  string(REPLACE "+PTX" "" number "${architecture}")
  if(architecture STREQUAL number)
    list(APPEND CUDA_FLAGS -gencode arch=compute_${number},code=sm_${number})
  else()
    list(APPEND CUDA_FLAGS -gencode arch=compute_${number},code=[sm_${number},compute_${number}])
  endif()
endforeach()

file(MAKE_DIRECTORY "${CMAKE_BINARY_DIR}/cuda")
# For tests that compile other files in the same way: an argument a line.
string(REPLACE ";" "\n" command "${CUDA_NVCC};${CUDA_FLAGS}")
file(WRITE "${CMAKE_BINARY_DIR}/cuda/nvcc_command" "${command}\n")

set(cuda_objects)
foreach(source ${CUDA_SOURCES})
  get_filename_component(name "${source}" NAME_WE)
  set(object "${CMAKE_BINARY_DIR}/cuda/${name}.o")
  add_custom_command(
    OUTPUT "${object}"
    COMMAND "${CUDA_NVCC}" ${CUDA_FLAGS} -MD -MF "${object}.d" -c "${CMAKE_SOURCE_DIR}/${source}" -o "${object}"
    DEPENDS "${CMAKE_SOURCE_DIR}/${source}" "${CUDA_NVCC}"
    DEPFILE "${object}.d"
    COMMENT "Compiling ${source} for ${cuda_architectures}"
    VERBATIM)
  list(APPEND cuda_objects "${object}")
endforeach()

add_library(pyconv_cuda STATIC EXCLUDE_FROM_ALL ${cuda_objects})
set_target_properties(pyconv_cuda PROPERTIES LINKER_LANGUAGE CXX)
set_source_files_properties(${cuda_objects} PROPERTIES EXTERNAL_OBJECT ON GENERATED ON)
target_include_directories(pyconv_cuda INTERFACE "${CMAKE_SOURCE_DIR}/cuda" "${CMAKE_SOURCE_DIR}/csrc")
# The shared runtime that torch loads has the same symbols; ours stay our own.
target_link_libraries(pyconv_cuda INTERFACE "${CUDA_STATIC_RUNTIME}" dl rt pthread)
target_link_options(pyconv_cuda INTERFACE "LINKER:--exclude-libs,libcudart_static.a")

# torch's headers and libraries from the paths setup.py found without importing torch. find_package(Torch) of a CUDA
# torch asks for libraries that we do not use and adds architectures that nvcc 13 rejects.
set(PK_TORCH_TARGET "2.10")  # the oldest torch the binary runs on

add_library(pk_torch INTERFACE)
target_include_directories(pk_torch SYSTEM INTERFACE ${PK_TORCH_DIR}/include)
target_compile_definitions(pk_torch INTERFACE TORCH_TARGET_VERSION=0x020a000000000000)
target_link_directories(pk_torch INTERFACE ${PK_TORCH_DIR}/lib)
target_link_libraries(pk_torch INTERFACE torch_cpu c10)
if(PK_WITH_CUDA)
  target_compile_definitions(pk_torch INTERFACE USE_CUDA)
  target_include_directories(pk_torch SYSTEM INTERFACE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
  target_link_libraries(pk_torch INTERFACE torch_cuda)
endif()

# CUDA: switched on by setup.py through PK_CUDA_ARCHS ("8.0;9.0a;12.0+PTX"), turned into explicit -gencode options,
# because CMAKE_CUDA_ARCHITECTURES of CMake 3.22 does not know names such as 90a.
if(PK_CUDA_ARCHS)
  set(PK_WITH_CUDA ON)
  set(CMAKE_CUDA_ARCHITECTURES OFF)
  set(CMAKE_CUDA_RUNTIME_LIBRARY Shared)  # before any add_library: the default is a static copy of the runtime
  set(CMAKE_CUDA_STANDARD 17)
  enable_language(CUDA)
  foreach(arch ${PK_CUDA_ARCHS})
    string(REPLACE "." "" number "${arch}")
    string(REPLACE "+PTX" "" number "${number}")
    list(APPEND PK_CUDA_GENCODE "SHELL:-gencode arch=compute_${number},code=sm_${number}")
    if(arch MATCHES "PTX")
      list(APPEND PK_CUDA_GENCODE "SHELL:-gencode arch=compute_${number},code=compute_${number}")
    endif()
  endforeach()
endif()

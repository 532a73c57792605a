# The ops library and pk_add_op(<op>), which adds csrc/<op>/. A file's name says how it is compiled:
#   <op>.cpp          glue: checks, allocates, dispatches, registers
#   <op>_cpu.cpp      kernels, once per level of isa.cmake
#   <op>_<level>.cpp  kernels of that level alone
#   <op>_cuda.cu      launchers without torch, with CUDA only
add_library(peft_kernels_ops SHARED)
target_link_libraries(peft_kernels_ops PRIVATE pk_torch)
# A missing object stops the link here and not an import later.
target_link_options(peft_kernels_ops PRIVATE -Wl,-z,defs)
if(PK_WITH_CUDA)
  target_compile_definitions(peft_kernels_ops PRIVATE PK_WITH_CUDA)
  target_compile_options(peft_kernels_ops PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:${PK_CUDA_GENCODE}>")
endif()
# Lowest level first: of an inline function of the standard library that several levels emit, the linker keeps the
# first copy, which must run everywhere.
foreach(level ${PK_ISAS})
  target_sources(peft_kernels_ops PRIVATE $<TARGET_OBJECTS:pk_cpu_${level}>)
endforeach()

function(pk_add_op op)
  set(folder ${CMAKE_CURRENT_SOURCE_DIR}/${op})
  file(GLOB sources CONFIGURE_DEPENDS ${folder}/*.cpp)
  foreach(source ${sources})
    get_filename_component(name ${source} NAME_WE)
    string(REGEX REPLACE "^.*_(avx512_bf16|[^_]*)$" "\\1" suffix ${name})
    if(suffix STREQUAL "cpu")
      foreach(level ${PK_ISAS})
        target_sources(pk_cpu_${level} PRIVATE ${source})
      endforeach()
    elseif(suffix MATCHES "^(baseline|avx2|avx512|avx512_bf16|amx)$")
      if(suffix IN_LIST PK_ISAS)
        target_sources(pk_cpu_${suffix} PRIVATE ${source})
      endif()
    else()
      target_sources(peft_kernels_ops PRIVATE ${source})
    endif()
  endforeach()
  if(PK_WITH_CUDA)
    file(GLOB sources CONFIGURE_DEPENDS ${folder}/*.cu)
    target_sources(peft_kernels_ops PRIVATE ${sources})
  endif()
endfunction()

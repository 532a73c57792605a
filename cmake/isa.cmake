# The CPU levels and their flags; csrc/common/isa.h chooses among them at run time. Each level is an object library.
include(CheckCXXCompilerFlag)

set(PK_ISAS baseline)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$" AND CMAKE_SYSTEM_NAME STREQUAL "Linux")
  list(APPEND PK_ISAS avx2 avx512 avx512_bf16 amx)
  set(PK_FLAGS_avx2 -mavx2 -mfma -mf16c -mbmi2)
  set(PK_FLAGS_avx512 ${PK_FLAGS_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl)
  set(PK_FLAGS_avx512_bf16 ${PK_FLAGS_avx512} -mavx512bf16 -mavx512vbmi)
  set(PK_FLAGS_amx ${PK_FLAGS_avx512_bf16} -mamx-tile -mamx-bf16)
  check_cxx_compiler_flag(-mamx-bf16 PK_COMPILER_KNOWS_AMX)
  if(NOT PK_COMPILER_KNOWS_AMX)
    message(FATAL_ERROR "${CMAKE_CXX_COMPILER} is too old for AMX: set CXX to GCC >= 11 or Clang >= 12")
  endif()
endif()

foreach(level ${PK_ISAS})
  add_library(pk_cpu_${level} OBJECT)
  # GCC 12 warns about its own AVX-512 headers.
  target_compile_options(pk_cpu_${level} PRIVATE ${PK_FLAGS_${level}} $<$<CXX_COMPILER_ID:GNU>:-Wno-uninitialized;-Wno-maybe-uninitialized>)
  target_compile_definitions(pk_cpu_${level} PRIVATE PK_ISA=${level})
endforeach()

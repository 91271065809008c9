# SPDX-License-Identifier: Apache-2.0
# fastbb_add_family(<stem>): one operator family from csrc/ops/<stem>/.
#
#   <stem>.cpp            host code (torch) -> _ops
#   <stem>_plan.cpp       launch plan, baseline code -> fastbb_kernels
#   <stem>_cpu.cpp        kernels, compiled once per instruction-set level -> fastbb_kernels
#   <stem>_cuda_plan.cpp  how CUDA kernels are launched, in every build -> fastbb_kernels
#   <stem>_cuda*.cu       CUDA kernels and their launches -> fastbb_cuda, where that is built
#
# Each copy of the kernel file is its own object library fastbb_<stem>_<level>, is told its level
# by FASTBB_ISA_<LEVEL>, and keeps everything but its table in an anonymous namespace: inline
# functions with external linkage would be merged across levels by the linker.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  set(FASTBB_ISA_LEVELS baseline avx2 avx512 avx512_bf16)
else()
  set(FASTBB_ISA_LEVELS baseline)
endif()
set(FASTBB_ISA_FLAGS_baseline "")
set(FASTBB_ISA_FLAGS_avx2 -mavx2 -mfma -mf16c)
set(FASTBB_ISA_FLAGS_avx512
  ${FASTBB_ISA_FLAGS_avx2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512)
set(FASTBB_ISA_FLAGS_avx512_bf16
  ${FASTBB_ISA_FLAGS_avx512} -mavx512bf16 -mavx512vnni -mavx512vbmi -mavx512bitalg
  -mavx512vpopcntdq)

function(fastbb_add_family stem)
  set(dir csrc/ops/${stem})
  target_sources(_ops PRIVATE ${dir}/${stem}.cpp)
  file(GLOB plans CONFIGURE_DEPENDS ${dir}/${stem}_plan.cpp ${dir}/${stem}_cuda_plan.cpp)
  target_sources(fastbb_core PRIVATE ${plans})
  if(FASTBB_NVCC)
    file(GLOB kernels CONFIGURE_DEPENDS ${dir}/${stem}_cuda*.cu)
    target_sources(fastbb_cuda PRIVATE ${kernels})
  endif()
  foreach(level IN LISTS FASTBB_ISA_LEVELS)
    set(object fastbb_${stem}_${level})
    string(TOUPPER ${level} LEVEL)
    add_library(${object} OBJECT ${dir}/${stem}_cpu.cpp)
    target_include_directories(${object} PRIVATE csrc)
    target_compile_definitions(${object} PRIVATE
      FASTBB_ISA_NAME=${level} FASTBB_ISA_${LEVEL}=1)
    # -ffp-contract: a*b+c may become one FMA; nothing else of fast-math is allowed (NaN and Inf
    # must propagate).
    target_compile_options(${object} PRIVATE
      -O3 -ffp-contract=fast -fno-math-errno -fno-trapping-math ${FASTBB_ISA_FLAGS_${level}})
    fastbb_set_warnings(${object})
    target_sources(fastbb_kernels PRIVATE $<TARGET_OBJECTS:${object}>)
  endforeach()
endfunction()

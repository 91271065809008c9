# SPDX-License-Identifier: Apache-2.0
function(fastbb_set_warnings target)
  target_compile_options(${target} PRIVATE -Wall -Wextra -Wshadow=local)
  # Vector values never cross a function boundary that is not inlined, so their ABI is moot.
  target_compile_options(${target} PRIVATE -Wno-psabi)
  if(FASTBB_WERROR)
    target_compile_options(${target} PRIVATE -Werror)
  endif()
endfunction()

# LAROSA_SANITIZE=address,undefined or thread: instruments every target that links larosa_options.
set(LAROSA_SANITIZE "" CACHE STRING "Sanitizers, comma separated: address,undefined or thread")

function(larosa_sanitize target)
  if(LAROSA_SANITIZE)
    target_compile_options(${target} INTERFACE
      $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${LAROSA_SANITIZE} -fno-omit-frame-pointer -fno-sanitize-recover=all>)
    target_link_options(${target} INTERFACE -fsanitize=${LAROSA_SANITIZE})
  endif()
endfunction()

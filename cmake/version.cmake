# Run at every build: writes OUTPUT from tools/version.h.in, touching it only when the commit changed.
execute_process(COMMAND git describe --always --dirty WORKING_DIRECTORY ${SOURCE_DIR}
                OUTPUT_VARIABLE LAROSA_COMMIT OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
if(NOT LAROSA_COMMIT)
  set(LAROSA_COMMIT "unknown commit")
endif()
configure_file(${SOURCE_DIR}/tools/version.h.in ${OUTPUT} @ONLY)

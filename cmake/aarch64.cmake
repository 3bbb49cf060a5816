# Cross-compiles for 64-bit Arm against the Debian packages that scripts/setup --arm64 unpacks, and runs the result under
# qemu.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_SYSROOT ${CMAKE_CURRENT_LIST_DIR}/../build/neon/sysroot)
cmake_path(NORMAL_PATH CMAKE_SYSROOT)
foreach(kind LIBRARY INCLUDE PACKAGE)
  set(CMAKE_FIND_ROOT_PATH_MODE_${kind} ONLY)
endforeach()

# OpenBLAS stands in a directory of its own: Debian's alternatives, which would link to it, are not run.
set(libraries /usr/lib/aarch64-linux-gnu)
set(ENV{PKG_CONFIG_SYSROOT_DIR} ${CMAKE_SYSROOT})
set(ENV{PKG_CONFIG_LIBDIR}
    ${CMAKE_SYSROOT}${libraries}/pkgconfig:${CMAKE_SYSROOT}${libraries}/openblas-pthread/pkgconfig)
# A core without SVE or anything else beyond the first Armv8: every 64-bit Arm runs what it runs.
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64 -cpu cortex-a72 -L ${CMAKE_SYSROOT} -E LD_LIBRARY_PATH=${libraries}/openblas-pthread)

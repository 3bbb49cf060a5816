# cmake --install: binary, library, headers, CMake package, pkg-config file.
include(CMakePackageConfigHelpers)
set(larosa_cmake_dir ${CMAKE_INSTALL_LIBDIR}/cmake/larosa)

install(TARGETS larosa EXPORT larosaTargets)
install(DIRECTORY include/larosa DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT larosaTargets NAMESPACE larosa:: DESTINATION ${larosa_cmake_dir})
if(TARGET larosa_cli)
  install(TARGETS larosa_cli)
endif()

if(NOT DEFINED BUILD_SHARED_LIBS)
  set(BUILD_SHARED_LIBS OFF)
endif()
configure_package_config_file(cmake/larosaConfig.cmake.in larosaConfig.cmake INSTALL_DESTINATION ${larosa_cmake_dir})
write_basic_package_version_file(larosaConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/larosaConfig.cmake ${PROJECT_BINARY_DIR}/larosaConfigVersion.cmake
        DESTINATION ${larosa_cmake_dir})

# Whoever links the static library links what it uses as well.
if(BUILD_SHARED_LIBS)
  set(LAROSA_PC_REQUIRES "Requires.private")
else()
  set(LAROSA_PC_REQUIRES "Requires")
  set(LAROSA_PC_LIBS "-ldnnl -lgomp -lpthread")
  if(LAROSA_HAS_CUDA)
    string(APPEND LAROSA_PC_LIBS " -L${CUDAToolkit_LIBRARY_DIR} -lcusolver -lcublas -lcublasLt -lcudart_static -ldl -lrt")
  endif()
endif()
configure_file(cmake/larosa.pc.in larosa.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/larosa.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)

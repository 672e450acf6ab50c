# What `cmake --install` puts under a prefix: libraries, headers and the CMake package `qat`. The wheel is the same
# tree with the folder `libqat` of site-packages as its prefix (pyproject.toml), plus the extension.

include(GNUInstallDirs)
include(CMakePackageConfigHelpers)
set(QAT_CONFIG_DIR "${CMAKE_INSTALL_DATADIR}/cmake/qat")

# Each other's neighbours. LibTorch needs no entry: whoever loads libqat (a program that links qat::qat, or
# `import libqat`) has loaded it already, and its place on this machine is none of the package's business.
set_target_properties(qat qat_models PROPERTIES INSTALL_RPATH "$ORIGIN")
set_target_properties(qat_models PROPERTIES EXPORT_NAME models)

install(TARGETS qat qat_models EXPORT qatTargets COMPONENT development
        LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}"
        INCLUDES DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
install(DIRECTORY "${PROJECT_SOURCE_DIR}/libqat/include/qat" COMPONENT development
        DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}" FILES_MATCHING PATTERN "*.hpp")
install(EXPORT qatTargets NAMESPACE qat:: COMPONENT development DESTINATION "${QAT_CONFIG_DIR}")

configure_package_config_file("${CMAKE_CURRENT_LIST_DIR}/qatConfig.cmake.in"
                              "${PROJECT_BINARY_DIR}/qatConfig.cmake" INSTALL_DESTINATION "${QAT_CONFIG_DIR}")
write_basic_package_version_file("${PROJECT_BINARY_DIR}/qatConfigVersion.cmake" COMPATIBILITY SameMinorVersion)
install(FILES "${PROJECT_BINARY_DIR}/qatConfig.cmake" "${PROJECT_BINARY_DIR}/qatConfigVersion.cmake"
              "${CMAKE_CURRENT_LIST_DIR}/qatTorch.cmake"
        COMPONENT development DESTINATION "${QAT_CONFIG_DIR}")

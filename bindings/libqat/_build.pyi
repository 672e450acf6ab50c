"""What this build of libqat is, and the torch it was compiled against. Written by CMake."""

version: str
torch_version: str

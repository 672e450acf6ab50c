# Stands in for a LibTorch of another version than libqat was built with.
set(Torch_FOUND TRUE)
set(TORCH_LIBRARIES "")
set(TORCH_INCLUDE_DIRS "")

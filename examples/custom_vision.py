"""QAT of a convolutional network in a PyTorch loop of one's own: EfficientNet-Lite0 at 4 and 2 bits.

    make custom                        # with the encoder; or, after `make build`:
    .venv/bin/python examples/custom_vision.py --photos my-photos

Two parts. The ImageNet network learns to agree with its float self on photos (no labels needed), which come
from a Debian package or from a folder of your own. Then the network is fine-tuned in float to read digits,
and that one is rounded. PTQ is rounding to nearest. Every figure belongs to the network that is read back
from the saved checkpoint. Results: tables on standard output, and vision.json in the folder `--out`. An
interrupted run continues after the last finished row.
"""

import argparse
import time
from pathlib import Path

import torch
from libqat.cli import console, program
from vision import digits, efficientnet, images, qat
from vision.study import Study

import libqat
from libqat import photos, run_folder

SENSITIVE = {"match": r"conv_stem|blocks\.\d+\.depthwise_conv", "weight": "int8_channel"}
"""3 % of the weights, where rounding hurts most: a depthwise channel is 9 or 25 weights with one scale."""
MIXED4 = {"rules": [SENSITIVE, {"match": ".*", "weight": "int4_channel"}]}
MIXED2 = {
    "rules": [
        SENSITIVE,
        {"match": r"blocks\.1[2-5]\..*|conv_head", "weight": "int2_channel"},
        {"match": ".*", "weight": "int4_channel"},
    ]
}
"""2 bits for half of the weights, the last blocks' pointwise convolutions."""
POLICIES = {
    "4 bits": ("int4-channel", 1e-4),
    "4 bits, stem and depthwise 8": (MIXED4, 1e-4),
    "2 bits": ("int2-channel", 1e-3),
    "2 bits in the last blocks, stem and depthwise 8, the rest 4": (MIXED2, 3e-4),
}
"""Title -> policy and learning rate: 2-bit weights have far to go from one level to the next."""
KINDS = ("ptq", "qat")
HEADINGS = {"top1": "top-1", "kl": "KL", "accuracy": "accuracy", "mean_layer_error": "layer error"}
DIGIT_SIDE = 64
TUNING_STEPS, DIGIT_STEPS = 1.5, 0.5
"""Of the photos' steps: fine-tuning in float, and QAT of that network. Ten classes are learned soon."""


def parse() -> argparse.Namespace:
    """The command line; the defaults are the published run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/custom"))
    parser.add_argument("--photos", help="folder of photos, or the Debian package (default: by apt-get)")
    parser.add_argument("--steps", type=int, default=160, help="per policy")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--views", type=int, default=4000, help="random views of the pictures to train on")
    parser.add_argument("--side", type=int, default=128, help="of an image in pixels, a multiple of 32")
    parser.add_argument("--batch-norm", choices=qat.BATCH_NORM, default="fold")
    parser.add_argument("--block-weight", type=float, default=100.0, help="of block outputs in the loss")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def training(options: argparse.Namespace, share: float = 1.0) -> qat.Training:
    """The settings that all policies share."""
    return qat.Training(
        steps=max(round(options.steps * share), 1),
        batch_size=options.batch_size,
        learning_rate=0.0,
        block_weight=options.block_weight,
        batch_norm=options.batch_norm,
        seed=options.seed,
    )


def rows(study: Study) -> list[dict]:
    """PTQ and QAT under each policy."""
    return [study.row(title, policy, rate) for title, (policy, rate) in POLICIES.items()]


def study_photos(options: argparse.Namespace, network: torch.nn.Module) -> dict:
    """ImageNet classes of photos, by agreement with the float network."""
    files = photos.photos(options.photos)
    console.say(f"reading {len(files.training)} pictures and {len(files.held_out)} held-out photos")
    held_out = images.on_white(images.read_all(files.held_out, options.side))
    generator = torch.Generator().manual_seed(options.seed)
    pictures = images.read_all(files.training, options.side)
    views = images.random_views(pictures, options.views, generator)
    reference = qat.logits_of(qat.shell(network, options.batch_norm), held_out)
    study = Study(
        name="photos",
        network=network,
        training=views,
        held_out=held_out,
        score=lambda logits: qat.agreement(reference, logits),
        folder=options.out / "vision",
        options=training(options),
    )
    return {
        "side": options.side,
        "training_pictures": len(pictures),
        "views": len(views),
        "held_out": len(held_out),
        "rows": rows(study),
    }


def study_digits(options: argparse.Namespace, network: torch.nn.Module) -> dict:
    """Digits, by the accuracy on the test set."""
    train_images, train_labels, test_images, test_labels = digits.read(DIGIT_SIDE)
    tuning, settings = training(options, TUNING_STEPS), training(options, DIGIT_STEPS)
    path = options.out / "vision" / "digits-float.pt"
    with console.progress("digits: fine-tuning in float") as update:
        tuned = digits.fine_tuned(network, train_images, train_labels, tuning, path, update)
    study = Study(
        name="digits",
        network=tuned,
        training=train_images,
        held_out=test_images,
        score=lambda logits: qat.accuracy(test_labels, logits),
        folder=options.out / "vision",
        options=settings,
    )
    return {
        "side": DIGIT_SIDE,
        "training_images": len(train_images),
        "test_images": len(test_images),
        "float": study.score(qat.logits_of(tuned, test_images)),
        "rows": rows(study),
    }


def print_table(result: dict) -> None:
    """The tables of vision.json."""
    for name, keys in (("photos", ("top1", "kl")), ("digits", ("accuracy",))):
        part = result[name]
        if "skipped" in part:
            console.out.print(f"{name}: skipped: {part['skipped']}", markup=False, soft_wrap=True)
            continue
        keys = (*keys, "mean_layer_error")
        columns = [f">{kind.upper()} {HEADINGS[key]}" for key in keys for kind in KINDS]
        table = console.table(title(name, part), "policy", ">bits", ">MB", *columns)
        for row in part["rows"]:
            figures = [shown(row[kind], key) for key in keys for kind in KINDS]
            size = (f"{row['bits_per_weight']:.2f}", f"{row['bytes'] / 1e6:.2f}")
            table.add_row(row["policy"], *size, *figures)
        console.out.print(table)


def title(name: str, part: dict) -> str:
    """What stands above a table."""
    if name == "photos":
        photos_ = f"{part['held_out']} held-out photos of {part['side']} pixels"
        return f"EfficientNet-Lite0: agreement with float on {photos_}"
    return f"Digits, {part['test_images']} to test: float {shown(part['float'], 'accuracy')}"


def shown(figures: dict, key: str) -> str:
    """A KL in nats, every other figure in percent."""
    return f"{figures[key]:.2f}" if key == "kl" else f"{figures[key]:.1%}"


def main() -> None:
    """Both parts in order."""
    begin = time.monotonic()
    options = parse()
    torch.set_num_threads(options.threads)
    (options.out / "vision").mkdir(parents=True, exist_ok=True)
    network = efficientnet.load()
    try:
        on_photos = study_photos(options, network)
    except libqat.FileError as error:
        console.say(f"without photos: {error}")
        on_photos = {"skipped": str(error)}
    result = {
        "model": "EfficientNet-Lite0",
        "float_bytes": sum(parameter.numel() * 4 for parameter in network.parameters()),
        "photos": on_photos,
        "digits": study_digits(options, network),
        "settings": {key: str(value) for key, value in vars(options).items()},
        "seconds": round(time.monotonic() - begin, 1),
    }
    path = options.out / "vision.json"
    run_folder.write_json(path, result)
    print_table(result)
    console.out.print(f"done in {console.clock(result['seconds'])}; figures: {path}", highlight=False)


if __name__ == "__main__":
    program.run(main)

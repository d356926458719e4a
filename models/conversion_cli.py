"""`lalte import` and `lalte export`. Imports nothing heavy, so that --help is quick."""

from __future__ import annotations

import argparse

IMPORT_HELP = "convert a checkpoint of another project into ours"
EXPORT_HELP = "convert a model of ours into another project's checkpoint"
KINDS = ("hybrid_gated_deltanet", "gated_deltanet", "transformer", "nsa")


def add_import_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options, description and examples of `lalte import` to a parser."""
    parser.description = (
        "Converts a checkpoint without changing a number: flash-linear-attention's gated_deltanet, transformer and\n"
        "nsa, and hybrid_gated_deltanet, the kind of the published laLTE and laNSA models (arXiv 2510.20787). Every\n"
        "tensor has to find its place; the new configuration is printed. Only safetensors are read."
    )
    parser.epilog = (
        "examples:\n"
        "  lalte import Idiap/gated-deltanet-lte-0.4B-10B --out models/lalte-0.4b\n"
        "  lalte import downloads/my-gated-deltanet --out models/gdn\n"
        '  lalte generate --model models/lalte-0.4b --prompt "Once upon a time"'
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", metavar="SRC", help="a folder, or the name of a model on the Hugging Face hub")
    parser.add_argument("--out", metavar="DIR", required=True, help="a new folder for the model")


def import_from_arguments(args: argparse.Namespace) -> int:
    """Runs `lalte import`; prints the converted configuration and the number of parameters.

    Raises:
        ValueError: anything that the user can set right.
    """
    from models.conversion import import_checkpoint
    from models.info import describe

    config = import_checkpoint(args.source, args.out)
    print(config.to_json_string(use_diff=True).rstrip())
    print(f"{describe(config).total:,} parameters; the model is in {args.out}")
    return 0


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options, description and examples of `lalte export` to a parser."""
    parser.description = (
        "Converts a model without changing a number. What was imported is given back as it was, bit by bit, unless\n"
        "it was trained on; an imported configuration is kept in import.json of the model's folder."
    )
    parser.epilog = (
        "examples:\n"
        "  lalte export models/lalte-0.4b --out exported/lalte-0.4b\n"
        "  lalte export runs/gdn --out exported/gdn --format hybrid_gated_deltanet"
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", metavar="DIR", help="folder of the model")
    parser.add_argument("--out", metavar="DIR2", required=True, help="a new folder for the checkpoint")
    parser.add_argument(
        "--format", metavar="KIND", choices=KINDS, help=f"{', '.join(KINDS)}; default: as imported, or what fits"
    )


def export_from_arguments(args: argparse.Namespace) -> int:
    """Runs `lalte export`; prints the configuration that was written.

    Raises:
        ValueError: anything that the user can set right.
    """
    import json

    from models.conversion import export_checkpoint

    written = export_checkpoint(args.model, args.out, args.format)
    print(json.dumps(written, indent=2))
    print(f"a checkpoint of kind {written['model_type']} is in {args.out}")
    return 0

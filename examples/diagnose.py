"""
A diagnosis of a model that is already there, whatever trained it: did its good answers become less likely?

    python examples/diagnose.py --policy my-dpo-model --reference my-sft-model --data prefs.jsonl
    python examples/diagnose.py --policy my-lora-adapter --data prefs.jsonl

The command `python -m dposhift_trl.diagnose` does the same; this script shows how to use the numbers in Python.
"""

import argparse

from dposhift_trl.data.config import DataConfig
from dposhift_trl.diagnose import DiagnoseSettings, diagnose


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--policy", required=True, help="trained model or adapter: folder or name on the Hub")
    parser.add_argument("--reference", help="model that training started from; by default the base of an adapter")
    parser.add_argument("--data", required=True, help="preference pairs: file, folder, or name on the Hub")
    parser.add_argument("--limit", type=int, help="score only the first pairs")
    parser.add_argument("--output-dir", default="diagnosis/example")
    options = parser.parse_args()

    result = diagnose(
        DiagnoseSettings(
            options.policy,
            DataConfig(options.data),
            reference=options.reference,
            limit=options.limit,
            output_dir=options.output_dir,
        )
    )
    print(result.verdict.headline)
    for tile in result.verdict.tiles:
        interval = "" if tile.low is None else f" (95% interval {tile.low:.3g} to {tile.high:.3g})"
        print(f"  {tile.name}: {tile.value:.3g} {tile.unit}{interval}, {tile.rating}")
    print(
        f"The scores of every pair are in {result.folder}. For the page: python -m dposhift_trl.report {result.folder}"
    )


if __name__ == "__main__":
    main()

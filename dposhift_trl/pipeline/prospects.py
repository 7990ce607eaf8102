"""What a recipe allows to be known after its run."""

from ..recipe import Recipe


def why_no_verdict(recipe: Recipe) -> str | None:
    """Why the run cannot end with a verdict, and what to write instead; `None` if it can, or has no stage `dpo`."""
    args = recipe.stages.get("dpo")
    if args is None:
        return None
    if not recipe.data.has_eval:
        return (
            "No verdict will be possible: there are no evaluation rows. Set `data.eval_split`, or for example "
            "`data.eval_size=0.1`."
        )
    if args.eval_strategy == "no":
        return (
            "No verdict will be possible: `dpo.eval_strategy` is `no`, so nothing is evaluated once training has "
            "begun. Write `dpo.eval_strategy=steps`."
        )
    return None

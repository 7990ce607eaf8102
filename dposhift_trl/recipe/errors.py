"""What is wrong with a recipe."""

from ..data.errors import one_line


class RecipeError(ValueError):
    """One or more mistakes in a recipe. Each line of the message is one mistake, written for the user."""

    def __init__(self, *mistakes: str):
        super().__init__("\n".join(map(one_line, mistakes)))

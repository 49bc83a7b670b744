import pytest

from deploy.errors import UsageError
from deploy.intake.reference import ReferenceRecipe


def test_reference_recipe_refuses_unknown_names_and_arguments() -> None:
    with pytest.raises(UsageError, match=r"unknown architecture 'lenet'; did you mean 'lenet5'.*or torchvision:NAME"):
        ReferenceRecipe("lenet")
    with pytest.raises(
        UsageError, match=r"cannot build convnet with drop=0\.1: convnet takes no argument 'drop'; did you mean 'dropout'"
    ):
        ReferenceRecipe("convnet").build({"drop": 0.1})
    with pytest.raises(UsageError, match="cannot build mobilenet_v1 with width='wide': "):
        ReferenceRecipe("mobilenet_v1").build({"width": "wide"})

"""A model as a checkpoint holds it."""

from pathlib import Path

from yacs.config import CfgNode

from modeling.foreign import stored_sizes
from modeling.make_model import ReIDModel, make_model
from utils.checkpoint import load_weights, state_dict_in
from utils.errors import UserError


def load_trained(cfg: CfgNode, stored: dict, path: str | Path, *, cameras: int = 0) -> ReIDModel:
    """Builds the config's model with as many identities and cameras as a checkpoint has, and fills it from there.

    Args:
        stored: what `utils.checkpoint.read_file` gave.
        path: the checkpoint.
        cameras: how many the images come from; 0 where the mean camera embedding is enough.

    Raises:
        UserError: the checkpoint does not fit the config, or knows fewer cameras.
    """
    classes, known = stored_sizes(state_dict_in(stored, path))
    if known is not None and cameras > known:
        raise UserError(
            f"{path} knows {known} cameras, the test images come from {cameras}: its camera embedding has no row for "
            "them. Test it on the data set it was trained on."
        )
    model = make_model(cfg, num_classes=classes or 0, num_cameras=known or 0, pretrained=False)
    load_weights(model, path)
    return model

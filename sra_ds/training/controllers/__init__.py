"""Controllers: the only things that change a schedule. Each is applied before a step from the step's
number alone or moves on its own after a step, and keeps what it must remember in `state_dict()`.

    schedules        functions of the step: learning rate, k, temperatures, ratios
    feedback         buffers that follow the step: selection bias, persistent memories
    remedies         anchors and biases of starved experts
    ghosts           which of them wake, and how far they are
    specialisation   how differently experts answer, and the weight that asks for more

The first two are built from the model, the others from the engine: they change weights, or look at them.
"""

from typing import Any

from sra_ds.config import Recipe
from sra_ds.config.model import PersistentMemoryConfig, WaveletsConfig
from sra_ds.model.embeddings.spectral import HybridEmbedding
from sra_ds.model.language_model import LanguageModel
from sra_ds.model.mixers.filters import LowPass
from sra_ds.training.controllers.feedback import MemoryWriter, SelectionBias
from sra_ds.training.controllers.ghosts import GhostKeeper
from sra_ds.training.controllers.protocol import BatchOf, Controller
from sra_ds.training.controllers.remedies import Remedies
from sra_ds.training.controllers.schedules import (
    ChoiceTemperature,
    RatioRamp,
    TemperatureSchedule,
    TopKSchedule,
)
from sra_ds.training.controllers.specialisation import Specialisation


def build_controllers(recipe: Recipe, model: LanguageModel) -> dict[str, Controller]:
    """The controllers of a model's buffers that a recipe asks for, by name."""
    training = recipe.training
    controllers: dict[str, Controller] = {}
    if training.top_k_schedule:
        controllers["top_k"] = TopKSchedule(model, training.top_k_schedule, training.steps)
    if training.temperature_schedule:
        knots = training.temperature_schedule
        controllers["temperature"] = TemperatureSchedule(model, knots, training.steps)
    if training.selection_bias_rate > 0:
        controllers["selection_bias"] = SelectionBias(model, training.selection_bias_rate)
    if isinstance(model.embedding, HybridEmbedding):
        controllers["ratio"] = RatioRamp(model.embedding, training.steps)
    mixer = recipe.model.mixer
    if isinstance(mixer, WaveletsConfig) and len(mixer.families) > 1:
        choosing = [module for module in model.modules() if isinstance(module, LowPass)]
        ends = mixer.choice_temperature
        controllers["choice_temperature"] = ChoiceTemperature(choosing, ends, training.steps)
    if isinstance(recipe.model.memory, PersistentMemoryConfig):
        controllers["memory"] = MemoryWriter(model)
    return controllers


def build_engine_controllers(
    recipe: Recipe, engine: Any, batch_of: BatchOf, untrained: bool
) -> dict[str, Controller]:
    """The controllers of weights and of the optimizer that a recipe asks for, by name. Collective where
    the model is `untrained` and a target is set, which is refused if it asks for nothing."""
    controllers: dict[str, Controller] = {}
    if recipe.training.remedies.active:
        controllers["remedies"] = Remedies(recipe, engine, batch_of)
    layers = engine.module.routed_layers()
    if recipe.training.ghosts is not None and layers[0].ghosts:
        controllers["ghosts"] = GhostKeeper(recipe, engine)
    if recipe.training.specialisation is not None:
        watch = Specialisation(recipe, engine, batch_of)
        if untrained:
            watch.require_reachable()
        controllers["specialisation"] = watch
    return controllers

"""Importing this registers the models with transformers' Auto classes as model_type `lalte`."""

import transformers.configuration_utils as configuration
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from models.cache import HybridCache
from models.config import LAYER_TYPES, HybridConfig
from models.modeling import HybridForCausalLM, HybridModel
from models.outputs import HybridOutput

AutoConfig.register(HybridConfig.model_type, HybridConfig, exist_ok=True)
AutoModel.register(HybridConfig, HybridModel, exist_ok=True)
AutoModelForCausalLM.register(HybridConfig, HybridForCausalLM, exist_ok=True)

# a Trainer of transformers that resumes reads config.json as a configuration of no kind, which refuses layer types
# that the library doesn't know
configuration.ALLOWED_ATTN_LAYER_TYPES += tuple(
    kind for kind in LAYER_TYPES if kind not in configuration.ALLOWED_ATTN_LAYER_TYPES
)

__all__ = ["HybridCache", "HybridConfig", "HybridForCausalLM", "HybridModel", "HybridOutput"]

"""Hybrid language models; importing this registers them with transformers' Auto classes as model_type `lalte`."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from models.cache import HybridCache
from models.config import HybridConfig
from models.modeling import HybridForCausalLM, HybridModel
from models.outputs import HybridOutput

AutoConfig.register(HybridConfig.model_type, HybridConfig, exist_ok=True)
AutoModel.register(HybridConfig, HybridModel, exist_ok=True)
AutoModelForCausalLM.register(HybridConfig, HybridForCausalLM, exist_ok=True)

__all__ = ["HybridCache", "HybridConfig", "HybridForCausalLM", "HybridModel", "HybridOutput"]

"""nanovllm: offline LLM inference for batches of prompts, small enough to read in an evening."""

from nanovllm.llm import LLM
from nanovllm.outputs import CompletionOutput, Increment, Logprob, RequestOutput
from nanovllm.prompts import TextPrompt, TokensPrompt
from nanovllm.sampling_params import SamplingParams, StructuredOutputsParams

__all__ = ["LLM", "CompletionOutput", "Increment", "Logprob", "RequestOutput", "SamplingParams"]
__all__ += ["StructuredOutputsParams", "TextPrompt", "TokensPrompt"]
__version__ = "0.1.0"

"""Fields of other servers' APIs that would change an answer and that nothing here honours: OpenAI, vLLM, SGLang, TGI,
llama.cpp's server and transformers' `generate`. Ignored, each would give another answer than its sender wants.

Fields that only name, route, count or speed up a call (`user`, `metadata`, `store`, `service_tier`, `prediction`,
`priority`, `cache_prompt` ...) are not here: they are ignored, like names that nobody knows.
"""

from __future__ import annotations

from collections.abc import Mapping

from kvbaton.cluster.http.errors import unsupported

_STRUCTURE = ": output is not constrained to a structure or a grammar"
_BEAMS = ": there is no beam search, set n for several samples"
_TEMPLATE = ": only the model's own chat template is used"
_TEMPLATE_OPTION = ": pass what the model's template reads in chat_template_kwargs"
_REASONING = ": reasoning is not told from the rest of the text"
_SAMPLING = ": of the ways to cut or weigh tokens there are temperature, top_p, top_k, min_p, penalties and logit_bias"
_TOKENS = ": use logit_bias"
_ADAPTER = ": no adapters are loaded"
_INPUT = ": prompts are text or token ids"
_WHOLE_PROMPT = ": a prompt is never shortened"
_DETAILS = ": use logprobs, with echo in /v1/completions for those of the prompt"

# Name: (what to say behind "... is not supported", values that ask for nothing). Null asks for nothing everywhere.
REFUSED: dict[str, tuple[str, tuple[object, ...]]] = {
    # output of a given form
    "guided_json": (_STRUCTURE, ()),
    "guided_regex": (_STRUCTURE, ()),
    "guided_choice": (_STRUCTURE, ()),
    "guided_grammar": (_STRUCTURE, ()),
    "structured_outputs": (_STRUCTURE, ()),
    "structural_tag": (_STRUCTURE, ()),
    "json_schema": (_STRUCTURE, ()),
    "regex": (_STRUCTURE, ("",)),
    "ebnf": (_STRUCTURE, ("",)),
    "grammar": (_STRUCTURE, ("",)),
    "grammar_lazy": (_STRUCTURE, (False,)),
    "grammar_triggers": (_STRUCTURE, ([],)),
    # beams, and samples chosen among more
    "use_beam_search": (_BEAMS, (False,)),
    "num_beams": (_BEAMS, (1,)),
    "length_penalty": (_BEAMS, (0, 1)),
    "early_stopping": (_BEAMS, (False,)),
    "best_of": (_BEAMS, (1,)),
    # which tokens may come
    "bad_words": (_TOKENS, ([],)),
    "bad_words_ids": (_TOKENS, ([],)),
    "allowed_token_ids": (_TOKENS, ()),
    "banned_tokens": (_TOKENS, ([], "")),
    "logits_processors": (_SAMPLING, ([],)),
    "custom_logit_processor": (_SAMPLING, ("",)),
    "custom_params": (_SAMPLING, ({},)),
    "vllm_xargs": (_SAMPLING, ({},)),
    "watermark": (_SAMPLING, (False,)),
    # how tokens are drawn
    "do_sample": (": set temperature to 0 for the likeliest tokens", (True,)),
    "repeat_penalty": (": use repetition_penalty", (1,)),
    "no_repeat_ngram_size": (_SAMPLING, (0,)),
    "typical_p": (_SAMPLING, (1, 0)),
    "tfs_z": (_SAMPLING, (1,)),
    "top_a": (_SAMPLING, (0,)),
    "top_n_sigma": (_SAMPLING, (-1, 0)),
    "epsilon_cutoff": (_SAMPLING, (0,)),
    "eta_cutoff": (_SAMPLING, (0,)),
    "penalty_alpha": (_SAMPLING, (0,)),
    "guidance_scale": (_SAMPLING, (1,)),
    "smoothing_factor": (_SAMPLING, (0,)),
    "dynatemp_range": (_SAMPLING, (0,)),
    "mirostat": (_SAMPLING, (0,)),
    "xtc_probability": (_SAMPLING, (0,)),
    "dry_multiplier": (_SAMPLING, (0,)),
    "min_keep": (_SAMPLING, (0, 1)),
    "samplers": (_SAMPLING, ()),
    "sampling_seed": (": use seed", ()),
    # how long an answer is and where it ends
    "max_new_tokens": (": use max_tokens", ()),
    "n_predict": (": use max_tokens", (-1,)),
    "min_new_tokens": (": use min_tokens", (0,)),
    "stop_regex": (": use stop", ([], "")),
    "stop_sequences": (": use stop", ([],)),
    "no_stop_trim": (": use include_stop_str_in_output", (False,)),
    "t_max_predict_ms": (": use timeout, in seconds", (0, -1)),
    "n_indent": ("", (0,)),
    "thinking_token_budget": (_REASONING, ()),
    "thinking_budget": (_REASONING, ()),
    # what the prompt is made of
    "chat_template": (_TEMPLATE, ("",)),
    "documents": (_TEMPLATE, ([],)),
    "tool_prompt": (_TEMPLATE, ("",)),
    "guideline": (_TEMPLATE, ("",)),
    "enable_thinking": (_TEMPLATE_OPTION, ()),
    "thinking": (_TEMPLATE_OPTION, ()),
    "reasoning_effort": (_TEMPLATE_OPTION, ("medium",)),
    "reasoning": (_TEMPLATE_OPTION, ({},)),
    "verbosity": (_TEMPLATE_OPTION, ("medium",)),
    "functions": (": use tools", ([],)),
    "function_call": (": use tools and tool_choice", ("none", "auto")),
    "web_search_options": (": there is nothing here that searches", ()),
    "truncate_prompt_tokens": (_WHOLE_PROMPT, ()),
    "truncate": (_WHOLE_PROMPT, ()),
    "n_keep": (_WHOLE_PROMPT, (0,)),
    "prompt_embeds": (_INPUT, ()),
    "input_embeds": (_INPUT, ()),
    "input_ids": (": use prompt", ()),
    "inputs": (": use prompt or messages", ()),
    "parameters": (": its members are fields of the body here", ({},)),
    "input_extra": (_INPUT, ([],)),
    "input_prefix": (_INPUT, ("",)),
    "input_suffix": (_INPUT, ("",)),
    "image_data": (_INPUT, ([],)),
    "audio_data": (_INPUT, ([],)),
    "video_data": (_INPUT, ([],)),
    "mm_processor_kwargs": (_INPUT, ({},)),
    "media_io_kwargs": (_INPUT, ({},)),
    "audio": (": answers are text", ()),
    "modalities": (": answers are text", (["text"],)),
    # which model computes
    "lora_path": (_ADAPTER, ("",)),
    "lora_request": (_ADAPTER, ()),
    "lora": (_ADAPTER, ([],)),
    "adapter_id": (_ADAPTER, ("",)),
    # what an answer has besides its text
    "prompt_logprobs": (_DETAILS, ()),
    "decoder_input_details": (_DETAILS, (False,)),
    "n_probs": (_DETAILS, (0,)),
    "top_n_tokens": (_DETAILS, (0,)),
    "top_logprobs_num": (_DETAILS, (0,)),
    "token_ids_logprob": (_DETAILS, ([],)),
    "logprob_token_ids": (_DETAILS, ([],)),
    "return_full_text": (": use echo in /v1/completions", (False,)),
    "return_tokens": (": use return_token_ids", (False,)),
    "return_tokens_as_token_ids": (": use return_token_ids", (False,)),
    "return_hidden_states": ("", (False,)),
    "return_routed_experts": ("", (False,)),
    "include_reasoning": (_REASONING, (True,)),
    "separate_reasoning": (_REASONING, (True,)),
    "reasoning_format": (_REASONING, ("none", "auto")),
}


def check_not_refused(fields: Mapping[str, object]) -> None:
    """Raise `ApiError` for the first of these fields that asks for something."""
    for name, value in fields.items():
        hint, neutral = REFUSED.get(name, ("", (value,)))
        if value is not None and value not in neutral:
            raise unsupported(name, hint)

"""Which fields of a checkpoint's config could change what its model computes.

Fields that a family reads are applied. Of the others, `INERT_KEYS`, tokens' names and ids, and what concerns training or a version are
known to change nothing and are dropped. A field that nobody knows is refused when a word of its name belongs to the computation
(`COMPUTING_WORDS`), and named in the log otherwise. docs/checkpoints.md has the same rule.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

# Fields of transformers' GenerationConfig, which versions before 5 wrote into config.json: they are parameters of requests.
GENERATION_KEYS = frozenset(
    "bad_words_ids begin_suppress_tokens cache_config cache_implementation constraints diversity_penalty do_sample dola_layers "
    "early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff "
    "exponential_decay_length_penalty force_words_ids forced_bos_token_id forced_eos_token_id guidance_scale length_penalty low_memory "
    "max_length max_new_tokens max_time min_length min_new_tokens min_p no_repeat_ngram_size num_assistant_tokens "
    "num_assistant_tokens_schedule num_beam_groups num_beams num_return_sequences output_logits output_scores penalty_alpha "
    "prefill_chunk_size prompt_lookup_num_tokens remove_invalid_values renormalize_logits repetition_penalty return_dict_in_generate "
    "sequence_bias stop_strings suppress_tokens temperature token_healing top_k top_p typical_p watermarking_config".split()
)

# Fields that describe storage, labels or other libraries' run time.
INERT_KEYS = GENERATION_KEYS | frozenset(
    "_name_or_path _num_labels architectures auto_map chunk_size_feed_forward custom_pipelines dtype finetuning_task finetuned "
    "id2label init_std is_decoder is_encoder_decoder is_llama_config keys_to_ignore_at_inference label2id language layerdrop "
    "max_sequence_length model_max_length model_type n_ctx n_special name_or_path num_labels output_attentions output_hidden_states "
    "output_past predict_special_tokens prefix problem_type pruned_heads quantization return_dict rope_interleaved "
    "summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj task_specific_params "
    "tf_legacy_loss tie_encoder_decoder tokenizer_class torch_dtype torchscript transformers.js_config use_bfloat16 use_cache "
    "vocab_size_is_padded".split()
)

# Training, versions, the choice of an implementation, and names and ids of tokens.
INERT_PATTERN = re.compile(
    r"unsloth_.*|neftune_.*|.*(^|_)version|.*dropout(_.*)?|.*_pdrop|initializer_.*|gradient_checkpointing.*"
    r"|_?\w*(attn|attention|experts)_implementation(_\w+)?|.*_token(_ids?)?|.*_loss_coef"
)

# Words by which config fields name a part of the computation. A word of a field's name counts that begins with one of these …
COMPUTING_STEMS = tuple(
    "activ alibi attend attention attn bias clip compress cross decoder dense depth embed encoder expert factor freq gate gating head "
    "hidden inter kernel latent layer logit lora mamba mask mlp moe mrope mscale multipl norm parallel pool posit precision project "
    "quant recurr residual rope rotar rout scal sink sliding soft spars ssm theta vocab weight width window".split()
)
# … or that is one of these.
COMPUTING_WORDS = frozenset(
    "act alpha beta block blocks cap causal chunk conv d decay dim dims ep eps epsilon ff ffn fn gamma glu groups interval k kv mtp mup "
    "pattern proj q qk query qkv rank ratio rms shared size skip sp state states stride swa temperature tie tied tp type types v".split()
)


def is_inert(key: str) -> bool:
    """Whether a field of a config is known to change nothing that the model computes."""
    return key in INERT_KEYS or INERT_PATTERN.fullmatch(key) is not None


def could_change(key: str) -> bool:
    """Whether the name of an unknown field has a word of the computation."""
    words = re.split(r"[^a-z0-9]+", re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", key).lower())
    return any(word in COMPUTING_WORDS or word.startswith(COMPUTING_STEMS) for word in words)


def sort_unknown(keys: Iterable[str], *, also_inert: Collection[str] = ()) -> tuple[list[str], list[str]]:
    """Fields that nobody read: those to be refused, and those to be named in the log. Known inert ones are in neither."""
    left = sorted(key for key in keys if not is_inert(key) and key not in also_inert)
    return [key for key in left if could_change(key)], [key for key in left if not could_change(key)]

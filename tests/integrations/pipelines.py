"""diffusers' own pipelines with small random weights, for an autoencoder of hop 64."""

from __future__ import annotations

from typing import Any

import diffusers
import tokenizers
import torch
import transformers

HOP, FRAMES = 64, 30


def tokenizer() -> Any:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1, "[PAD]": 2}, "[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", model_max_length=6
    )


def stable_audio(vae: Any) -> Any:
    torch.manual_seed(1)
    text = transformers.T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    latent_dim = vae.config.decoder_input_channels
    pipe = diffusers.StableAudioPipeline(
        vae=vae,
        text_encoder=transformers.T5EncoderModel(text).eval(),
        projection_model=diffusers.StableAudioProjectionModel(8, 8, 0, 10),
        tokenizer=tokenizer(),
        transformer=diffusers.StableAudioDiTModel(
            sample_size=FRAMES,
            in_channels=latent_dim,
            out_channels=latent_dim,
            num_layers=1,
            attention_head_dim=4,
            num_attention_heads=2,
            num_key_value_attention_heads=1,
            cross_attention_dim=8,
            time_proj_dim=8,
            global_states_input_dim=16,
            cross_attention_input_dim=8,
        ).eval(),
        scheduler=diffusers.EDMDPMSolverMultistepScheduler(solver_order=2, sigma_max=10),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ace_step(vae: Any) -> Any:
    torch.manual_seed(1)
    latent_dim = vae.config.decoder_input_channels
    shared = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
    }
    text = transformers.Qwen3Config(vocab_size=8, num_hidden_layers=1, **shared)
    pipelines = diffusers.pipelines.ace_step
    pipe = diffusers.AceStepPipeline(
        vae=vae,
        text_encoder=transformers.Qwen3Model(text).eval(),
        tokenizer=tokenizer(),
        transformer=diffusers.AceStepTransformer1DModel(
            num_hidden_layers=1,
            in_channels=3 * latent_dim,
            audio_acoustic_hidden_dim=latent_dim,
            **shared,
        ).eval(),
        condition_encoder=pipelines.AceStepConditionEncoder(
            text_hidden_dim=8,
            timbre_hidden_dim=latent_dim,
            num_lyric_encoder_hidden_layers=1,
            num_timbre_encoder_hidden_layers=1,
            **shared,
        ).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe

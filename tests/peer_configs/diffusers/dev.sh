#!/bin/bash
export MODEL_NAME="black-forest-labs/FLUX.2-dev"
export INSTANCE_DIR="datasets/dog"
OUTPUT_DIR=${OUT:-"trained/dog"}

if ! command -v accelerate; then pip install accelerate; fi

accelerate launch --mixed_precision=bf16 train_dreambooth_lora_flux2.py \
  --pretrained_model_name_or_path=$MODEL_NAME  \
  --instance_data_dir="$INSTANCE_DIR" --output_dir=$OUTPUT_DIR \
  --do_fp8_training --gradient_checkpointing --remote_text_encoder --cache_latents \
  --instance_prompt="a photo of sks dog" \
  --validation_prompt='a photo of sks dog in a bucket' \
  --resolution=1024 --train_batch_size=1 --guidance_scale=1 \
  --use_8bit_adam --gradient_accumulation_steps=4 --optimizer="adamW" \
  --learning_rate=1e-4 --report_to="wandb" --lr_sched="constant_with_warmup" --lr_warmup_steps=100 \
  --rank=16 --rank=8 --max_train_steps=500 --with_prior_preservation --class_data_dir datasets/dogs --class_prompt dog --seed="0"

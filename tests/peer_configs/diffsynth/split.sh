accelerate launch examples/flux2/model_training/train.py --task "sft:data_process" \
  --dataset_base_path datasets/mug --dataset_metadata_path datasets/mug/metadata.csv --height 1024 --width 768 \
  --model_id_with_origin_paths "black-forest-labs/FLUX.2-klein-base-4B:text_encoder/*.safetensors,black-forest-labs/FLUX.2-klein-base-4B:vae/*.safetensors" \
  --output_path ./models/train/mug_cache
accelerate launch examples/flux2/model_training/train.py --task "sft:train" \
  --dataset_base_path ./models/train/mug_cache --save_steps 200 \
  --model_id_with_origin_paths "black-forest-labs/FLUX.2-klein-base-4B:transformer/*.safetensors" --tokenizer_path black-forest-labs/FLUX.2-klein-base-4B:tokenizer/ \
  --lora_target_modules "to_q,to_k,to_v,to_out.0" --lora_rank 16 --output_path ./models/train/mug --enable_wandb_log

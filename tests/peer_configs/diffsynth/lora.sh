# The recommended command, with a folder of one's own
export DATA="datasets/tea set"
accelerate launch --num_processes 2 examples/flux2/model_training/train.py \
  --dataset_base_path "$DATA" \
  --dataset_metadata_path "${DATA}/metadata.csv" \
  --max_pixels 1048576 \
  --dataset_repeat 50 \
  --model_id_with_origin_paths "black-forest-labs/FLUX.2-dev:text_encoder/*.safetensors,black-forest-labs/FLUX.2-dev:transformer/*.safetensors,black-forest-labs/FLUX.2-dev:vae/diffusion_pytorch_model.safetensors" \
  --learning_rate 1e-4 \
  --num_epochs 5 \
  --remove_prefix_in_ckpt "pipe.dit." \
  --output_path "./models/train/tea-set" \
  --lora_base_model "dit" \
  --lora_target_modules "to_q,to_k,to_v,to_out.0,add_q_proj,add_k_proj,add_v_proj,to_add_out,linear_in,linear_out,to_qkv_mlp_proj,to_out" \
  --lora_rank 32 \
  --use_gradient_checkpointing

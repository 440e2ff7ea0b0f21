accelerate launch train_dreambooth_lora_flux2_klein.py --pretrained_model_name_or_path black-forest-labs/FLUX.2-klein-base-4B \
  --dataset_name linoyts/3d-icon --caption_column prompt --instance_prompt "3d icon" --lora_layers "attn.to_q,attn.to_k,attn.to_v" \
  --weighting_scheme logit_normal --logit_mean 0.5 --logit_std 0.8 --rank 32 --lora_alpha 32 --output_dir 3dicon --max_train_steps 700

accelerate launch --num_cpu_threads_per_process 1 --mixed_precision bf16 src/musubi_tuner/flux_2_train_network.py \
  --model_version dev --dit models/flux2-dev.safetensors --vae models/ae.safetensors --text_encoder models/mistral.safetensors \
  --dataset_config dataset.toml --sdpa --mixed_precision bf16 --timestep_sampling flux2_shift --weighting_scheme none \
  --optimizer_type adamw8bit --learning_rate 1e-4 --gradient_checkpointing --max_data_loader_n_workers 2 \
  --persistent_data_loader_workers --network_module networks.lora_flux_2 --network_dim 32 --network_alpha 16 \
  --network_args "rank_dropout=0.1" --max_train_steps 1600 --save_every_n_steps 400 --seed 42 --fp8_base --fp8_scaled \
  --sample_prompts prompts.txt --sample_every_n_steps 400 --output_dir output --output_name lighthouse

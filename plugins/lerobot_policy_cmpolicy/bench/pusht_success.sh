#!/usr/bin/env bash
# Push-T from state in LeRobot's own commands: cmpolicy and LeRobot's DiffusionPolicy, networks of the
# same widths, about the same processor time each (`time` counts it), then 50 episodes of gym-pusht.
#
#   pusht_success.sh DATA OUT [STEPS_CMPOLICY STEPS_DIFFUSION]     in LeRobot's environment
#
# DATA: the data set that pusht_data.py writes.
set -euo pipefail
data=$1 out=$2 ours=${3:-1050} theirs=${4:-950}
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 SDL_VIDEODRIVER=dummy
TIMEFORMAT='%U s user, %R s real'
common=(--dataset.repo_id=me/pusht "--dataset.root=$data" --batch_size=64 --num_workers=0 --seed=1
  --policy.device=cpu --policy.push_to_hub=false --policy.optimizer_lr=1e-3
  --policy.scheduler_warmup_steps=100)
score=(--policy.device=cpu --env.type=pusht --env.obs_type=environment_state_agent_pos
  --eval.n_episodes=50 --eval.batch_size=50 --seed=100000)

train() {
  time lerobot-train --policy.type="$1" "${common[@]}" --steps="$2" --save_freq="$2" \
    --output_dir="$out/$1" "${@:3}" >"$out/train_$1.log" 2>&1
}
score() { # name, checkpoint's run, settings
  time lerobot-eval --policy.path="$out/$2/checkpoints/last/pretrained_model" "${score[@]}" \
    --output_dir="$out/eval_$1" "${@:3}" >"$out/eval_$1.log" 2>&1
}

mkdir -p "$out"
train cmpolicy "$ours" --policy.ema.decay=0.99
train diffusion "$theirs" --policy.down_dims='[64,128,256]'
score cmpolicy cmpolicy
score cmpolicy_4 cmpolicy --policy.nfe=4
score ddim10 diffusion --policy.noise_scheduler_type=DDIM --policy.num_inference_steps=10
score ddpm100 diffusion

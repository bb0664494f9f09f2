#!/usr/bin/env bash
# Builds, tests and benches commopt on a GPU, in under nine minutes:
#
#     bench/gpu.sh [FOLDER [PYTHON]]
#
# FOLDER, bench/results by default, gets the JSON of every bench and one page with what each part said, both named for the GPU:
# h200.md. A part that fails or takes too long is shown there, the others go on, and the exit status is 1. PYTHON, python3 by
# default, must have a torch that sees the GPU, and pytest, pybind11 and ninja, better pytest-xdist too; nothing is downloaded.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${2:-python3}
"$python" -c "import torch; raise SystemExit(not torch.cuda.is_available())" 2>/dev/null || {
    echo "bench/gpu.sh: $python has no torch that sees a GPU here: run it on a machine with one, or name another interpreter: bench/gpu.sh FOLDER PYTHON" >&2
    exit 1
}
results=$(realpath -m "${1:-bench/results}")
mkdir -p "$results"
gpu=$("$python" -c "import torch; print(torch.cuda.get_device_name().replace('NVIDIA ', '').split()[0].lower())")
page=$results/$gpu.md
parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT
began=$SECONDS

# part TITLE SECONDS COMMAND...: runs it. What it said is a section of the page.
part() {
    local title=$1 limit=$2 start=$SECONDS left=$((began + 530 - SECONDS)) status said
    limit=$((limit < left ? limit : left > 1 ? left : 1))  # of nine minutes
    shift 2
    said=$(mktemp "$parts/XXXX")
    timeout --kill-after=10 "$limit" "$@" >"$said" 2>"$said.stderr"
    status=$?
    {
        printf '\n## %s\n\n`%s`\n\n```text\n' "$title" "$*"
        tail -n 400 "$said"
        if [ "$status" -ne 0 ]; then
            touch "$parts/failed"
            tail -n 60 "$said.stderr"
            echo "exit status $status"
        fi
        printf '```\n\n%s s\n' "$((SECONDS - start))"
    } >"$said.page"
    flock "$parts" tee -a "$page" <"$said.page"
}

cat <<PAGE | tee "$page"
# commopt on a GPU

- date: $(date -u +%Y-%m-%dT%H:%MZ)
- device: $(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader)
- torch: $("$python" -c "import torch, sys; print(torch.__version__, 'CUDA', torch.version.cuda, 'NCCL', '.'.join(map(str, torch.cuda.nccl.version())), 'Python', sys.version.split()[0])")
- nvcc: $(nvcc --version 2>/dev/null | tail -n 1)
- command: \`bench/gpu.sh\`
PAGE

arch=$("$python" -c "import torch; print('%d%d' % torch.cuda.get_device_capability())")
part "Build for sm_$arch" 150 env COMMOPT_CUDA=1 COMMOPT_CUDA_ARCHS="$arch" "$python" -m pip install -q --no-build-isolation --no-deps -e .
part "What is built" 30 "$python" -m commopt info

# What is not timed runs side by side.
workers=$("$python" -c "import xdist" 2>/dev/null && echo "-n $(($(nproc) - 2))")
part "Bits of the reference, and trainings over NCCL and gloo" 180 env OMP_NUM_THREADS=1 "$python" -m pytest -q -p no:benchmark $workers tests/test_on_gpu.py tests/test_cuda_kernels.py -k on_gpu &
for tool in memcheck racecheck; do
    part "compute-sanitizer, $tool" 90 compute-sanitizer --tool "$tool" --error-exitcode 9 --launch-timeout 0 "$python" tests/on_gpu_small.py &
done
wait

part "Kernels" 90 "$python" -m commopt bench kernels --device cuda --backends cuda,triton --n 67108864 --turns 9 --no-compile --json "$results/$gpu-kernels.json"
part "Kernels of small and of large gradients" 60 "$python" -m commopt bench kernels --device cuda --n 6500000,536870912 --dtype float32,bfloat16 --turns 5 --no-torch \
    --spec int8:ef=true,int4,topk:ratio=0.01 --json "$results/$gpu-kernels-sizes.json"
part "torch.compile" 60 "$python" -m commopt bench kernels --device cuda --n 67108864 --turns 5 --spec int8:ef=true,int4 --what encode --json "$results/$gpu-kernels-compile.json"
part "The hook" 60 "$python" -m commopt bench hook --device cuda --profile --json "$results/$gpu-hook.json"
echo "$((SECONDS - began)) s in all, $([ -e "$parts/failed" ] && echo "with failures" || echo "every part passed")" | tee -a "$page"
[ ! -e "$parts/failed" ]

#!/usr/bin/env bash
# Builds, tests and benches commopt on a GPU, in under nine minutes:
#
#     bench/gpu.sh [FOLDER [PYTHON]]
#
# FOLDER, bench/results by default, gets the JSON of every bench and one page, gpu.md, with what each part said. A part that
# fails or takes too long is shown there, the others go on, and the exit status is 1. PYTHON, python3 by default, must have a
# torch that sees the GPU, and pytest, pybind11 and ninja; nothing is downloaded.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${2:-python3}
"$python" -c "import torch; raise SystemExit(not torch.cuda.is_available())" 2>/dev/null || {
    echo "bench/gpu.sh: $python has no torch that sees a GPU here: run it on a machine with one, or name another interpreter: bench/gpu.sh FOLDER PYTHON" >&2
    exit 1
}
results=$(realpath -m "${1:-bench/results}")
mkdir -p "$results"
page=$results/gpu.md
failed=0
began=$SECONDS

say() { tee -a "$page"; }

# part TITLE SECONDS COMMAND...: runs it and writes what it said onto the page.
part() {
    local title=$1 limit=$2 start=$SECONDS left=$((began + 530 - SECONDS)) status
    limit=$((limit < left ? limit : left > 1 ? left : 1))  # of nine minutes
    shift 2
    printf '\n## %s\n\n`%s`\n\n```text\n' "$title" "$*" | say
    timeout --kill-after=10 "$limit" "$@" 2>"$results/stderr" | tail -n 400 | say
    status=${PIPESTATUS[0]}
    if [ "$status" -ne 0 ]; then
        failed=1
        tail -n 40 "$results/stderr" | say
        echo "exit status $status" | say
    fi
    printf '```\n\n%s s\n' "$((SECONDS - start))" | say
}

: >"$page"
cat <<PAGE | say
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
part "Bits of the reference" 120 "$python" -m pytest -q -x tests/test_on_gpu.py -k "bits_of_the_reference"
part "Trainings over NCCL and gloo" 120 "$python" -m pytest -q tests/test_on_gpu.py -k "not bits_of_the_reference"
for tool in memcheck racecheck; do
    part "compute-sanitizer, $tool" 40 compute-sanitizer --tool "$tool" --error-exitcode 9 --launch-timeout 0 "$python" tests/on_gpu_small.py
done
part "Kernels" 90 "$python" -m commopt bench kernels --device cuda --n 6500000,67108864 --turns 7 --no-compile \
    --spec int8,int8:ef=true,int4,sign,topk:ratio=0.01,topk:scope=threshold,topk:scope=block --json "$results/gpu-kernels.json"
part "Kernels of large and of bfloat16 gradients" 60 "$python" -m commopt bench kernels --device cuda --n 536870912 --dtype bfloat16 --turns 3 --no-torch \
    --spec int8:ef=true,int4,topk:ratio=0.01 --json "$results/gpu-kernels-large.json"
part "torch.compile" 60 "$python" -m commopt bench kernels --device cuda --n 67108864 --turns 5 --spec int8:ef=true,int4 --what encode --json "$results/gpu-kernels-compile.json"
part "The hook" 60 "$python" -m commopt bench hook --device cuda --json "$results/gpu-hook.json"
rm -f "$results/stderr"
echo "$((SECONDS - began)) s in all, $([ "$failed" = 0 ] && echo "every part passed" || echo "with failures")" | say
exit "$failed"

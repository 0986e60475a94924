#!/usr/bin/env bash
# What a person does who has the wheel and no checkout: try_wheel.sh VENV/bin, in a folder to work in.
# VENV has the wheel and examples/key_and_door, and nothing of a checkout.
set -euo pipefail
export PATH="$1:$PATH" OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
unset PYTHONPATH
fail() { echo "try_wheel: $*" >&2; exit 1; }

play=(datamodule=key_and_door prompt=plain memory=transcript max_turns=7 max_new_tokens=8 max_context=512)
aem-train --help | grep -q 'aem-train --config-dir FOLDER' || fail "the help of aem-train"
aem-analysis | grep -q 'Type aem-analysis' || fail "the list of analyses"
(aem-train group_sise=4 2>&1 || true) | grep -q 'aem-train --cfg job' || fail "a misspelt key"

# A person's own copy of the options, one of them edited.
aem-configs mine
aem-configs mine 2>/dev/null && fail "a folder was overwritten"
sed -i.bak 's/^seed: 0 /seed: 5 /' mine/train.yaml
aem-train "${play[@]}" debug=fast name=key --config-dir mine | tee run.txt
grep -q 'iteration 1/1: ' run.txt || fail "nothing was trained"
grep -q '^seed: 5$' logs/key/*/.hydra/config.yaml || fail "the edited file was not read"

# What the run prints is typed as it stands, and holds no word of a checkout.
next="$(grep -o 'aem-eval .*' run.txt | head -1)"
[[ "$next" == *"--config-dir "*mine ]] || fail "printed: $next"
eval "$next"
aem-view logs/key/* | tail -3
aem-train "${play[@]}" stage=check | grep 'keeps the contract'
grep -rn 'train\.py\|eval\.py' run.txt && fail "a script of the checkout is named"
[[ "$(ls)" == $'data\nlogs\nmine\nrun.txt' ]] || fail "something else was written: $(ls)"
echo "try_wheel: the wheel works without a checkout"

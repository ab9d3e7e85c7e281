#!/bin/bash
# The Dockerfile built, and a stage run in the image by Prefect's docker worker: on Debian, as root, without a Docker engine.
#
#     bench/container.sh [--install]       installs Debian's buildah, podman, runc, debootstrap first
#
# Builds with buildah, in $IMAGES (a folder of images, /var/tmp/dualign-images unless set), unless the image is there.
# Where python:3.11-slim-bookworm cannot be pulled, a Debian bookworm with its own Python takes its name. A pip.conf of the
# machine and the folder $PIP_FIND_LINKS are seen while building; $VLLM is the Dockerfile's VLLM. The worker, prefect-docker in
# an environment of its own, talks to podman's service as to Docker's. Then `python -m bench.container` compares the stage with
# a run outside.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
[ "${1:-}" != --install ] || { apt-get update -qq; apt-get install -qq -y --no-install-recommends buildah podman runc debootstrap; }
base=docker.io/library/python:3.11-slim-bookworm
images=${IMAGES:-/var/tmp/dualign-images}
folder=$(mktemp -d)
service=''
stop() { [ -z "$service" ] || kill "$service" 2>/dev/null || true; rm -rf "$folder"; }
trap stop EXIT
mkdir -p "$images"
export CONTAINERS_STORAGE_CONF=$folder/storage.conf CONTAINERS_CONF=$folder/containers.conf
printf '[storage]\ndriver="%s"\nrunroot="%s/run"\ngraphroot="%s/graph"\n' "${DRIVER:-overlay}" "$images" "$images" >"$CONTAINERS_STORAGE_CONF"
# A machine may not allow the limits that podman's service asks for; containers have those of the machine here.
cat >"$folder/runtime" <<'END'
#!/bin/bash
for ((k = 1; k < $#; k++)); do
    if [ "${!k}" = --bundle ]; then
        next=$((k + 1))
        python3 -c 'import json, sys; p = sys.argv[1]; c = json.load(open(p)); c["process"].pop("rlimits", 0); json.dump(c, open(p, "w"))' \
            "${!next}/config.json"
    fi
done
exec runc "$@"
END
chmod +x "$folder/runtime"
cat >"$CONTAINERS_CONF" <<END
[containers]
netns="host"
[engine]
runtime="bare"
cgroup_manager="cgroupfs"
events_logger="file"
[engine.runtimes]
bare=["$folder/runtime"]
END

if ! buildah inspect dualign-worker >/dev/null 2>&1; then
    if ! buildah pull -q "$base" 2>/dev/null; then
        echo "no $base to pull: a Debian bookworm stands in" >&2
        debootstrap --variant=minbase --include=python3.11,python3-dev,python3-venv,ca-certificates bookworm "$folder/root" >/dev/null
        chroot "$folder/root" python3 -m venv /usr/local
        made=$(buildah from scratch)
        buildah add -q "$made" "$folder/root" /
        buildah config --env PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin --cmd python3 "$made"
        buildah commit -q "$made" "$base" && buildah rm "$made"
    fi
    git clone -q "$here" "$folder/context"
    seen=(-v /etc/ssl/certs:/etc/ssl/certs:ro)
    if [ -n "${PIP_FIND_LINKS:-}" ]; then
        printf '[global]\nfind-links=%s\ncert=/etc/ssl/certs/ca-certificates.crt\n' "$PIP_FIND_LINKS" >"$folder/pip.conf"
        seen+=(-v "$folder/pip.conf:/etc/pip.conf:ro" -v "$PIP_FIND_LINKS:$PIP_FIND_LINKS:ro" --build-arg TORCH_INDEX=https://pypi.org/simple)
    fi
    buildah bud --isolation chroot "${seen[@]}" --build-arg "VLLM=${VLLM:-}" --build-arg ORIGIN=file:///origin.git -t dualign-worker "$folder/context"
fi

if [ -z "${WORKER:-}" ]; then
    "${PYTHON:-python}" -m venv "$folder/worker"
    "$folder/worker/bin/pip" install -q prefect prefect-docker -c "$here/constraints.txt"
    WORKER=$folder/worker/bin/python
fi
podman rm --all --force >/dev/null  # what a run that was killed has left
podman system service --time 0 "unix://$folder/podman.sock" &
service=$!
export DOCKER_HOST=unix://$folder/podman.sock
cd "$here" && "${PYTHON:-python}" -m bench.container --worker "$WORKER"

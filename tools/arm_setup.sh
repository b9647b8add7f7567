#!/usr/bin/env bash
# Makes FOLDER an aarch64 Python with ONNX Runtime that runs here under emulation: FOLDER/python SCRIPT [ARG ...]
# Needs a Debian machine's own package sources and pip; installs nothing on the machine itself.
# The emulator comes from Debian 13: qemu 7 of Debian 12 dies when it imports ONNX Runtime.
set -euo pipefail
folder=$(mkdir -p "$1" && cd "$1" && pwd)
sources=/etc/apt/sources.list.d/debian.sources
release=$(. /etc/os-release && echo "$VERSION_CODENAME")

private_apt() { # NAME ARCHITECTURE SUITE: an apt of its own, with the machine's mirrors
    local dir=$folder/apt-$1
    mkdir -p "$dir"/{state/lists/partial,cache/archives/partial,etc}
    touch "$dir/state/status"
    # The main suite alone: security and updates have other names, and are of no use here.
    awk -v RS= -v ORS='\n\n' -v old="$release" -v new="$3" \
        '!/-security/ { gsub(" " old "-[a-z-]+", ""); gsub(old, new); print }' "$sources" >"$dir/etc/debian.sources"
    cat >"$dir/apt.conf" <<EOF
APT::Architecture "$2"; APT::Architectures { "$2"; };
Dir::State "$dir/state"; Dir::State::Status "$dir/state/status"; Dir::Cache "$dir/cache";
Dir::Etc::SourceList "$dir/etc/debian.sources"; Dir::Etc::SourceParts "/dev/null";
EOF
    APT_CONFIG=$dir/apt.conf apt-get -qq update
}

private_apt arm arm64 "$release"
(cd "$folder" && APT_CONFIG=$folder/apt-arm/apt.conf apt-get -qq -y -d install --no-install-recommends \
    python3.11 libstdc++6 libgomp1 >/dev/null)
for deb in "$folder"/apt-arm/cache/archives/*.deb; do dpkg-deb -x "$deb" "$folder/root"; done

private_apt emulator "$(dpkg --print-architecture)" trixie
mkdir -p "$folder/qemu"
(cd "$folder/qemu" && APT_CONFIG=$folder/apt-emulator/apt.conf apt-get -qq download qemu-user >/dev/null)
dpkg-deb -x "$folder"/qemu/qemu-user_*.deb "$folder/qemu"

python3 -m pip download --quiet --no-deps --only-binary=:all: --implementation cp --abi cp311 --python-version 3.11 \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux_2_17_aarch64 \
    --platform manylinux2014_aarch64 -d "$folder/wheels" onnxruntime==1.32.0 numpy==2.4.6
mkdir -p "$folder/site"
for wheel in "$folder"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$folder/site"; done

cat >"$folder/python" <<EOF
#!/usr/bin/env bash
# ARM_CPU chooses the core: neoverse-n2 (Armv9) unless set.
ORT_DISABLE_TELEMETRY=1 PYTHONHOME=$folder/root/usr PYTHONPATH=$folder/site exec \\
    "$folder/qemu/usr/bin/qemu-aarch64" -cpu "\${ARM_CPU:-neoverse-n2}" -L "$folder/root" "$folder/root/usr/bin/python3.11" "\$@"
EOF
chmod +x "$folder/python"
"$folder/python" -c 'import onnxruntime, platform; print(platform.machine(), "onnxruntime", onnxruntime.__version__)'

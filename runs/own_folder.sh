# Sourced by the scripts here that make environments.

# start_anew FOLDER MARKER: empty a folder that an earlier run made, or make it, and mark it as made here.
#
# The file MARKER in it says whose the folder is from its first moment on, so a run that was killed half-way is made
# anew by the next. What has none is somebody else's and stays.
start_anew() {
    local folder="${1%/}" marker="$2"
    if [ -L "$folder" ]; then
        echo "error: $folder is a link and not up to date, and what it points to may be in use elsewhere. Remove the" \
            "link to have an environment made here, or bring the other up to date where it is." >&2
        exit 2
    fi
    if [ -e "$folder" ] && [ ! -f "$folder/$marker" ] && [ -n "$(ls -A "$folder")" ]; then
        echo "error: $folder was not made by this script (it has no $marker), so it is left as it is. Move it away" \
            "or delete it to have an environment made there." >&2
        exit 2
    fi
    mkdir -p "$folder"
    echo "being made" >"$folder/$marker"
    find "$folder" -mindepth 1 -maxdepth 1 ! -name "$marker" -exec rm -rf {} +
}

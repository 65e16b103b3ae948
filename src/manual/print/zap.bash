# Completion of zap in bash: source <(zap completions bash)
_zap() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} command= word words=
    COMPREPLY=()
    case $prev in
        -c | --config)
            compopt -o filenames 2>/dev/null
            mapfile -t COMPREPLY < <(compgen -f -- "$cur")
            return
            ;;
        --port | --url) return ;;
    esac
    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
        case $word in
            @COMMANDS_OR@)
                command=$word
                break
                ;;
        esac
    done
    case $command in
        '') words='@COMMANDS@ --config --watch --help --version' ;;
        check) words='--config --live --help' ;;
        completions) words='@SHELLS@' ;;
        demo) words='--chaos --port --help' ;;
        example) words='@PROVIDERS@' ;;
        healthcheck) words='--config --url --help' ;;
        help) words='@TOPICS@' ;;
        print) words='@FILES@' ;;
    esac
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")
}
complete -F _zap zap

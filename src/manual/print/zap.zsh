#compdef zap
# Completion of zap in zsh: zap completions zsh >"${fpath[1]}/_zap", or source <(zap completions zsh) after compinit.
_zap() {
    local -a commands
    commands=(
        'check:validate the configuration'
        'completions:print the completions of a shell'
        'demo:serve in front of built-in mock providers'
        'example:print a commented configuration'
        'healthcheck:ask a running Zap whether it works'
        'help:print the manual'
        'man:print the man page'
        'print:print a file for running and watching Zap'
    )
    local -a file
    file=('(-c --config)'{-c,--config}'[the configuration]:file:_files')
    _arguments -C $file '(-h --help)'{-h,--help}'[print the usage]' '(-V --version)'{-V,--version}'[print the version]' \
        '--watch[reload when a file changes]' \
        '1:command:->command' '*::argument:->argument'
    case $state in
        command) _describe command commands ;;
        argument)
            case $words[1] in
                check) _arguments $file '--live[ask each backend too]' ;;
                completions) _arguments '1:shell:(@SHELLS@)' ;;
                demo) _arguments '--chaos[add a provider that fails]' '--port[the port to listen on]:port:' ;;
                example) _arguments '*:provider:(@PROVIDERS@)' ;;
                healthcheck) _arguments $file '--url[what to ask]:URL:_urls' ;;
                help) _arguments '1:topic:(@TOPICS@)' ;;
                print) _arguments '1:file:(@FILES@)' ;;
            esac
            ;;
    esac
}
if [ "$funcstack[1]" = _zap ]; then _zap "$@"; else compdef _zap zap; fi

//! The page for a person at `/` and `/status`.

use std::io::Read as _;

use flate2::read::GzDecoder;

use crate::support::{CHAT, File, Provider, Response, Zap, eventually};

const BROWSER: &str = "accept: text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8\r\n";

fn get(zap: &Zap, path: &str, headers: &str) -> Response {
    let mut client = zap.client();
    client.send(format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n{headers}\r\n"));
    client.response()
}

/// The table row of the page with this attribute.
fn row<'p>(page: &'p str, mark: &str) -> &'p str {
    let rows = page.split("<tr ").find(|row| row.contains(mark));
    rows.unwrap_or_else(|| panic!("no row with {mark}: {page}")).split("</tr>").next().unwrap()
}

#[test]
fn only_a_request_for_html_gets_the_page() {
    let a = Provider::named("a");
    let zap = Zap::with("", &[a.backend("a", "")]);
    for path in ["/", "/status"] {
        let page = get(&zap, path, BROWSER);
        assert_eq!(
            (page.status, page.header("content-type")),
            (200, Some("text/html; charset=utf-8")),
            "{path}"
        );
        assert_eq!(page.header("vary"), Some("accept, accept-encoding"));
        assert!(page.text().starts_with("<!doctype html>"), "{path}");
        for headers in ["", "accept: */*\r\n", "accept: application/json\r\n", "accept: text/html;q=0\r\n"] {
            let other = get(&zap, path, headers);
            let (kind, vary) = match path {
                "/" => ("text/plain; charset=utf-8", "accept"),
                _ => ("application/json", "accept, accept-encoding"),
            };
            assert_eq!(
                (other.header("content-type"), other.header("vary")),
                (Some(kind), Some(vary)),
                "{headers}"
            );
            assert!(other.text().ends_with('\n') && !other.text().contains('<'), "{headers}");
        }
    }
    let mut client = zap.client();
    client.send(format!("HEAD /status HTTP/1.1\r\nhost: localhost\r\n{BROWSER}\r\n"));
    let head = client.head();
    assert_eq!((head.status, head.header("content-type")), (200, Some("text/html; charset=utf-8")));
}

#[test]
fn a_browser_gets_the_page_compressed_and_so_does_a_program_that_asks_for_it() {
    let a = Provider::named("a");
    let zap = Zap::with("", &[a.backend("a", "")]);
    for (accept, part) in [(BROWSER, "data-backend=\"a\""), ("", "{\"name\":\"a\"")] {
        let packed = get(&zap, "/status", &format!("{accept}accept-encoding: gzip, deflate, br\r\n"));
        assert_eq!(packed.header("content-encoding"), Some("gzip"));
        let mut text = String::new();
        GzDecoder::new(&packed.body[..]).read_to_string(&mut text).unwrap();
        assert!(text.contains(part) && text.len() > packed.body.len(), "{text}");
        assert_eq!(get(&zap, "/status", accept).header("content-encoding"), None);
    }
}

#[test]
fn the_page_allows_its_own_style_and_script_alone_and_names_no_other_host() {
    let a = Provider::named("a");
    let zap = Zap::with("", &[a.backend("a", "")]);
    let page = get(&zap, "/", BROWSER);
    let policy = page.header("content-security-policy").unwrap().to_owned();
    assert!(policy.starts_with("default-src 'none'; "), "{policy}");
    assert!(!policy.contains("unsafe") && policy.contains("connect-src 'self'; "), "{policy}");
    for (directive, tag) in [("style-src", "style"), ("script-src", "script")] {
        let text = page.text().split(&format!("<{tag}>")).nth(1).unwrap();
        let text = text.split(&format!("</{tag}>")).next().unwrap();
        let hash = sha256_base64(text);
        assert!(policy.contains(&format!("{directive} 'sha256-{hash}'; ")), "{tag}: {hash}: {policy}");
        assert_eq!(page.text().matches(&format!("<{tag}")).count(), 1, "{tag}");
    }
    for part in ["http:", "https:", "//", " src=", " style=", " onload=", "127.0.0.1"] {
        // The script has comments.
        let found = page.text().split("<script>").next().unwrap().contains(part);
        assert!(!found, "{part}");
    }
    for (name, want) in [
        ("x-content-type-options", "nosniff"),
        ("referrer-policy", "no-referrer"),
        ("cache-control", "no-store"),
    ] {
        assert_eq!(page.header(name), Some(want));
    }
}

/// The hash of a text as a policy writes it.
fn sha256_base64(text: &str) -> String {
    use std::io::Write as _;
    use std::process::{Command, Stdio};
    let command = "openssl dgst -sha256 -binary | openssl base64 -A";
    let run = Command::new("sh").args(["-c", command]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut child = run.unwrap();
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap()
}

#[test]
fn all_rows_are_there_without_javascript_and_the_worst_comes_first() {
    let (a, dead) = (Provider::named("good"), Provider::fixed(500, "", "{}"));
    let keys = "[[client_keys]]\nname = \"team\"\nkey = \"zk-team\"\nbudget = { usd = 2, per = \"day\" }\n\
        [health]\nfailure_threshold = 1\n";
    let prices = "prices = { \"*\" = { input = 1, output = 1 } }";
    let zap = Zap::with(
        keys,
        &[a.backend("fine", prices), dead.backend("broken", &format!("{prices}\nmax_in_flight = 7"))],
    );
    for _ in 0..4 {
        assert_eq!(zap.client().chat("authorization: Bearer zk-team\r\n", CHAT).status, 200);
    }
    let mut page = String::new();
    eventually("the page shows the outage", || {
        page = get(&zap, "/status", BROWSER).text().to_owned();
        page.contains("<h1>1 of 2 backends take requests</h1>")
    });
    assert!(page.contains("<title>1 of 2 backends take requests - Zap</title>"));
    let head = page.split("</ul>").next().unwrap();
    for part in [
        "<strong>broken</strong> is down since ",
        " UTC (",
        "s). A request without a model failed: HTTP 500.",
    ] {
        assert!(head.contains(part), "no {part}: {head}");
    }
    let broken = row(&page, "data-backend=\"broken\"");
    for part in
        ["class=\"bad\"", "data-state=\"ejected\"", "> down<", "0 of 7", "HTTP 500", "<svg role=\"img\""]
    {
        assert!(broken.contains(part), "no {part}: {broken}");
    }
    let fine = row(&page, "data-backend=\"fine\"");
    assert!(fine.contains("> up<") && fine.contains("takes requests"), "{fine}");
    assert!(page.find("data-backend=\"broken\"") < page.find("data-backend=\"fine\""));
    let team = row(&page, "data-client=\"team\"");
    assert!(team.contains("of $2.00 a day"), "{team}");
    let failure = row(&page, "<strong>broken</strong>: HTTP 500");
    assert!(failure.contains(">team<") && failure.contains("fine has served it"), "{failure}");
}

#[test]
fn the_head_says_why_a_backend_cools_down_and_for_how_long() {
    let (a, busy) = (Provider::named("a"), Provider::fixed(429, "retry-after: 30\r\n", ""));
    let zap = Zap::with("", &[busy.backend("busy", ""), a.backend("a", "priority = 1")]);
    assert_eq!(zap.chat(CHAT).text(), "a");
    let page = get(&zap, "/", BROWSER).text().to_owned();
    let head = page.split("</ul>").next().unwrap();
    let told = head.split("<strong>busy</strong> is cooling down since ").nth(1).expect("it is in the head");
    let told = told.split("</li>").next().unwrap();
    assert!(
        told.contains("), again in ") && told.contains(" s. The provider asked to wait: HTTP 429."),
        "{told}"
    );
}

#[test]
fn the_head_names_the_models_that_no_backend_serves() {
    let (a, dead) = (Provider::named("a"), Provider::fixed(500, "", "{}"));
    let models = |name: &str| format!("models = [\"both\", \"{name}\"]");
    let zap = Zap::with(
        "[health]\nfailure_threshold = 1\n",
        &[a.backend("fine", &models("safe")), dead.backend("broken", &models("gone"))],
    );
    assert_eq!(zap.client().get("/status").json()["unserved_models"], serde_json::json!([]));
    assert_eq!(zap.chat(r#"{"model":"gone","messages":[]}"#).status, 500);
    eventually("the model is named", || {
        let page = get(&zap, "/", BROWSER).text().to_owned();
        page.contains("<li class=\"bad\">No backend can serve <strong>gone</strong> now.</li>")
    });
    assert_eq!(zap.client().get("/status").json()["unserved_models"], serde_json::json!(["gone"]));
}

#[test]
fn markup_of_a_provider_and_of_a_client_is_shown_as_text() {
    let text = "{\"error\":{\"message\":\"<script>alert(1)</script> \\\"'&\"}}";
    let a = Provider::fixed(401, "", text);
    let zap = Zap::with("", &[a.backend("a", "api_key = \"sk-CANARY-1\"")]);
    zap.chat("{\"model\":\"<img src=x onerror=alert(2)>\",\"messages\":[]}");
    let mut page = String::new();
    eventually("the failure is on the page", || {
        page = get(&zap, "/", BROWSER).text().to_owned();
        page.contains("<strong>a</strong>: HTTP 401")
    });
    assert!(page.contains("&lt;script&gt;alert(1)&lt;/script&gt; &quot;&#39;&amp;"), "{page}");
    assert!(page.contains("&lt;img src=x onerror=alert(2)&gt;"));
    assert!(!page.contains("<script>alert") && !page.contains("<img") && !page.contains("sk-CANARY"));
}

#[test]
fn a_rejected_reload_is_on_the_page_with_its_fault() {
    let a = Provider::named("a");
    let file = File::new();
    let zap = Zap::with_file(&file, "", &[a.backend("a", "")]);
    file.write("colour = \"<b>\"", &[a.backend("a", "")]);
    assert!(!zap.reload());
    let mut page = String::new();
    eventually("the page shows it", || {
        page = get(&zap, "/", BROWSER).text().to_owned();
        page.contains(" UTC was rejected</strong>")
    });
    assert!(page.contains("unknown key `colour`"), "{page}");
}

#[test]
fn without_client_keys_pages_of_others_cannot_open_the_page() {
    let a = Provider::named("a");
    let foreign = format!("{BROWSER}sec-fetch-site: cross-site\r\nsec-fetch-mode: navigate\r\n");
    let open = Zap::with("", &[a.backend("a", "")]);
    for path in ["/", "/status"] {
        assert_eq!(get(&open, path, &foreign).status, 403, "{path}");
    }
}

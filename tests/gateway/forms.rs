//! Forms: the model is read and replaced, all other bytes pass as they come.

use crate::support::{Client, Provider, Response, Zap};

const PATHS: [(&str, &str); 4] = [
    ("/v1/audio/transcriptions", "transcriptions"),
    ("/v1/audio/translations", "translations"),
    ("/v1/images/edits", "image_edits"),
    ("/v1/images/variations", "image_variations"),
];

const TYPE: &str = "content-type: multipart/form-data; boundary=\"x y\"\r\n";

const JSON: &str = "content-type: application/json\r\n";

fn form(parts: &[&[u8]]) -> Vec<u8> {
    let mut body = b"preamble\r\n".to_vec();
    for part in parts {
        body.extend_from_slice(b"--x y\r\n");
        body.extend_from_slice(part);
        body.extend_from_slice(b"\r\n");
    }
    body.extend_from_slice(b"--x y--\r\nepilogue");
    body
}

fn model(name: &str) -> Vec<u8> {
    format!("Content-Disposition: form-data; name=\"model\"\r\n\r\n{name}").into_bytes()
}

/// A file with bytes that look like a delimiter.
fn file() -> Vec<u8> {
    let head = b"Content-Disposition: form-data; name=\"file\"; filename=\"a.wav\"\r\nContent-Type: audio/wav\r\n\r\n";
    let sound: Vec<u8> = (0..100_000u32).map(|i| (i.wrapping_mul(i) % 251) as u8).collect();
    [&head[..], &sound, b"\r\n--x\r\n--x \r\n\n-"].concat()
}

fn post(zap: &Zap, path: &str, headers: &str, body: &[u8]) -> Response {
    let mut client: Client = zap.client();
    client.post(path, headers, body);
    client.response()
}

#[test]
fn a_form_passes_byte_for_byte_with_its_content_type() {
    let a = Provider::echo();
    let zap = Zap::with("", &[a.backend("a", "api_key = \"sk-a\"")]);
    let body = form(&[&file(), &model("whisper-1")]);
    for (path, name) in PATHS {
        for path in [path, path.strip_prefix("/v1").unwrap()] {
            let answer = post(&zap, path, TYPE, &body);
            assert_eq!((answer.status, answer.body == body), (200, true), "{path}");
        }
        let seen = a.seen().pop().unwrap();
        assert_eq!(seen.line, format!("POST {path} HTTP/1.1"));
        assert_eq!(seen.header("content-type"), Some("multipart/form-data; boundary=\"x y\""));
        assert_eq!(seen.header("authorization"), Some("Bearer sk-a"));
        let series = format!("zap_requests_total{{endpoint=\"{name}\",backend=\"a\",status=\"200\"}}");
        assert_eq!(zap.metric(&series), 2.0, "{name}");
        assert_eq!(zap.client().get(path).header("allow"), Some("POST"));
    }
}

#[test]
fn the_model_routes_a_form_and_is_replaced_in_it() {
    let (a, b) = (Provider::echo(), Provider::echo());
    let zap = Zap::with(
        "",
        &[
            a.backend("a", "models = { speech = \"whisper-large\" }"),
            b.backend("b", "models = [\"other\", \"other-*\"]\ndefault_model = \"other-default\""),
        ],
    );
    let file = file();
    for (sent, got, name) in [
        (form(&[&file, &model("speech")]), form(&[&file, &model("whisper-large")]), "a"),
        (form(&[&model("speech"), &file]), form(&[&model("whisper-large"), &file]), "a"),
        (form(&[&model("other"), &file]), form(&[&model("other"), &file]), "b"),
        (form(&[&model(""), &file]), form(&[&model("other-default"), &file]), "b"),
        (form(&[&file]), form(&[&model("other-default"), &file]), "b"),
    ] {
        let answer = post(&zap, PATHS[0].0, TYPE, &sent);
        assert_eq!((answer.status, answer.header("x-zap-backend")), (200, Some(name)));
        assert!(answer.body == got, "{}", String::from_utf8_lossy(&answer.body[..200]));
    }
    let answer = post(&zap, PATHS[0].0, TYPE, &form(&[&file, &model("nobody")]));
    assert_eq!((answer.status, answer.code().as_str()), (404, "model_not_found"));
    let any = Zap::with("", &[a.backend("a", "")]);
    let body = form(&[&file]);
    assert!(post(&any, PATHS[2].0, TYPE, &body).body == body, "without a default it goes out as it is");
}

#[test]
fn a_form_that_can_be_read_in_two_ways_is_refused() {
    let a = Provider::echo();
    let zap = Zap::with("", &[a.backend("a", "")]);
    let good = form(&[&model("m")]);
    let cut = &good[..good.len() - 20];
    let case = form(&[b"Content-Disposition: form-data; name=\"Model\"\r\n\r\nm"]);
    let twice = form(&[&model("m"), &model("n")]);
    for (headers, body, code) in [
        (TYPE, &*twice, "duplicate_key"),
        (TYPE, &case, "duplicate_key"),
        (TYPE, cut, "invalid_multipart"),
        (TYPE, b"", "invalid_multipart"),
        (TYPE, b"{\"model\":\"m\"}", "invalid_multipart"),
        (JSON, b"{\"model\":\"m\"}", "invalid_multipart"),
        ("", &good, "invalid_multipart"),
        ("content-type: multipart/form-data\r\n", &good, "invalid_multipart"),
        ("content-type: multipart/form-data; boundary=z\r\n", &good, "invalid_multipart"),
        (
            "content-type: multipart/form-data; boundary=\"x y\"\r\ncontent-type: text/plain\r\n",
            &good,
            "invalid_multipart",
        ),
    ] {
        let answer = post(&zap, PATHS[1].0, headers, body);
        assert_eq!((answer.status, answer.code().as_str()), (400, code), "{headers}");
    }
    assert_eq!(a.count(), 0);
    assert_eq!(zap.metric("zap_rejected_total{reason=\"invalid_multipart\"}"), 8.0);
}

#[test]
fn a_form_is_sent_to_the_next_backend_with_that_ones_model() {
    let down = Provider::fixed(500, JSON, "{}");
    let b = Provider::echo();
    let route = "[models.speech]\ntargets = [{ backend = \"a\", model = \"one\" }, { backend = \"b\", model = \"two\", priority = 1 }]\n";
    let zap = Zap::with(route, &[down.backend("a", ""), b.backend("b", "")]);
    let file = file();
    // In chunks, each with the beginning of what may be a delimiter.
    let body = form(&[&model("speech"), &file]);
    let mut client = zap.client();
    client.send(format!(
        "POST /v1/audio/transcriptions HTTP/1.1\r\nhost: zap\r\ntransfer-encoding: chunked\r\n{TYPE}\r\n"
    ));
    for piece in body.chunks(7_777) {
        client.send([format!("{:x}\r\n", piece.len()).as_bytes(), piece, b"\r\n"].concat());
    }
    client.send("0\r\n\r\n");
    let answer = client.response();
    assert_eq!((answer.status, answer.header("x-zap-attempts")), (200, Some("2")));
    assert!(answer.body == form(&[&model("two"), &file]));
    assert!(down.seen()[0].body == form(&[&model("one"), &file]));
}

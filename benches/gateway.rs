//! Round trip of a request on loopback, directly to a provider and through Zap: a JSON response, and a stream.
//!
//! `cargo bench --bench gateway`. Client, Zap and provider run in this process: the client on criterion's thread, Zap's
//! one worker and the provider on threads of their own. Requests are sent one at a time, so a figure is latency, most
//! of it spent in the kernel and the scheduler; for CPU time per request see `benches/table.py`.

#![allow(missing_docs, reason = "criterion's macro writes a public function")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a benchmark that cannot continue must panic")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;

use criterion::{Criterion, criterion_group, criterion_main};
use zap::internals::Config;
use zap::internals::Log;
use zap::internals::{Order, orders};

/// A chat request body of about 1 KB.
fn body(stream: bool) -> String {
    let turn = "The quick brown fox jumps over the lazy dog. ".repeat(4);
    let turns =
        [("user", &turn), ("assistant", &turn), ("user", &turn), ("assistant", &turn), ("user", &turn)];
    let messages = turns.map(|(role, text)| format!(r#"{{"role":"{role}","content":"{text}"}}"#)).join(",");
    format!(r#"{{"messages":[{messages}],"temperature":0.7,"model":"mock","stream":{stream}}}"#)
}

/// A provider that responds at once, with a JSON body or a stream of ten events.
fn provider() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for connection in listener.incoming() {
            std::thread::spawn(move || answer(connection.unwrap()));
        }
    });
    address
}

fn answer(mut socket: TcpStream) {
    socket.set_nodelay(true).unwrap();
    let text =
        format!(r#"{{"choices":[{{"message":{{"role":"assistant","content":"{}"}}}}]}}"#, "x".repeat(640));
    let length = text.len();
    let one = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{text}"
    );
    let event = format!("data: {{\"choices\":[{{\"delta\":{{\"content\":\"{}\"}}}}]}}\n\n", "x".repeat(170));
    let chunk = format!("{:x}\r\n{event}\r\n", event.len());
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    let stream = [head, &chunk.repeat(10), "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"].concat();
    let mut request = Vec::new();
    let mut piece = [0; 16 * 1024];
    loop {
        match socket.read(&mut piece) {
            Ok(n) if n > 0 => request.extend_from_slice(&piece[..n]),
            _ => return,
        }
        if is_complete(&request) {
            let wants_stream = memchr::memmem::find(&request, b"\"stream\":true").is_some();
            socket.write_all(if wants_stream { stream.as_bytes() } else { one.as_bytes() }).unwrap();
            request.clear();
        }
    }
}

/// A client that sends the same request again and again on one connection.
struct Client {
    stream: TcpStream,
    request: Vec<u8>,
    answer: Vec<u8>,
}

impl Client {
    fn new(to: SocketAddr, stream: bool) -> Self {
        let body = body(stream);
        let request = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: zap\r\nauthorization: Bearer sk-client\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        let socket = TcpStream::connect(to).unwrap();
        socket.set_nodelay(true).unwrap();
        Client { stream: socket, request: request.into_bytes(), answer: Vec::new() }
    }

    fn ask(&mut self) {
        self.stream.write_all(&self.request).unwrap();
        self.answer.clear();
        let mut piece = [0; 16 * 1024];
        while !is_complete(&self.answer) {
            let n = self.stream.read(&mut piece).unwrap();
            assert!(n > 0, "connection closed in a response: {}", String::from_utf8_lossy(&self.answer));
            self.answer.extend_from_slice(&piece[..n]);
        }
        assert!(self.answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&self.answer));
    }
}

/// Whether a message is complete.
fn is_complete(answer: &[u8]) -> bool {
    let Some(end) = memchr::memmem::find(answer, b"\r\n\r\n").map(|at| at + 4) else { return false };
    let head = String::from_utf8_lossy(&answer[..end]).to_lowercase();
    match head.split("content-length: ").nth(1) {
        Some(rest) => answer.len() - end == rest.split("\r\n").next().unwrap().parse::<usize>().unwrap(),
        None => answer.ends_with(b"\r\n0\r\n\r\n"),
    }
}

fn through_zap(c: &mut Criterion) {
    let provider = provider();
    let text = format!(
        "[server]\nworkers = 1\n[log]\nrequests = false\n[rate_limit]\nrequests_per_minute = 4000000000\n\
         [[backends]]\nname = \"a\"\nurl = \"http://{provider}\"\nweight = 1\napi_key = \"sk-upstream\"\ndefault_model = \"mock\"\n"
    );
    let config = Config::parse(&text, "bench", Path::new(""), &|_| None).unwrap_or_else(|e| panic!("{e}"));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let zap = listener.local_addr().unwrap();
    let (order, receiver) = orders();
    let log = Log::start(config.log.format);
    let serving = std::thread::spawn(move || zap::run(config, log, listener, receiver).unwrap());
    for (kind, stream) in [("json", false), ("events", true)] {
        let mut group = c.benchmark_group(kind);
        for (name, to) in [("direct", provider), ("zap", zap)] {
            let mut client = Client::new(to, stream);
            group.bench_function(name, |b| b.iter(|| client.ask()));
        }
        group.finish();
    }
    order.blocking_send(Order::Now).unwrap();
    serving.join().unwrap();
}

criterion_group!(benches, through_zap);
criterion_main!(benches);

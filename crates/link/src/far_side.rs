//! The far side of a connection: `pgthaw attach --stdio` says who it is and hears what is wanted.

use std::io;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::greeting::{Greeting, GreetingError, PROTOCOL, Welcome, parse, read_line, write_line};

/// How long the near side may take until it says what it wants.
const GREETING_LIMIT: Duration = Duration::from_secs(60);
/// How often a connection without traffic is tried, and how long an answer may take.
pub(crate) const PING_INTERVAL: Duration = Duration::from_secs(5);
pub(crate) const PING_LIMIT: Duration = Duration::from_secs(10);

/// Says `welcome` and returns what the near side wants. Reads not a byte more.
///
/// # Errors
/// [`GreetingError`], also for another protocol.
pub async fn welcome_and_greet(
    input: &mut (impl AsyncRead + Unpin),
    output: &mut (impl AsyncWrite + Unpin),
    welcome: &Welcome,
) -> Result<Greeting, GreetingError> {
    write_line(output, welcome).await?;
    let line = tokio::time::timeout(GREETING_LIMIT, read_line(input)).await;
    let line = line.map_err(|_| GreetingError::Ended("nothing was said in time".into()))??;
    let greeting: Greeting = parse(&line)?;
    if greeting.pgthaw == PROTOCOL { Ok(greeting) } else { Err(GreetingError::Other(line)) }
}

/// Answers HTTP/2 calls until the near side ends the connection or is silent for too long.
///
/// # Errors
/// What broke the connection.
pub async fn serve_calls(
    input: impl AsyncRead + Unpin + Send + 'static,
    output: impl AsyncWrite + Unpin + Send + 'static,
    router: Router,
) -> io::Result<()> {
    let connection = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_LIMIT)
        .max_concurrent_streams(256)
        .serve_connection(
            TokioIo::new(tokio::io::join(input, output)),
            TowerToHyperService::new(router),
        );
    connection.await.map_err(io::Error::other)
}

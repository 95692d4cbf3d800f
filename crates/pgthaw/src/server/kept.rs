//! A connection that is made again whenever it breaks, for as long as somebody holds it.

use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Between two connections, at first and at most.
const FIRST_REST: Duration = Duration::from_millis(200);
const LONGEST_REST: Duration = Duration::from_secs(5);
/// A connection that held longer than this was a good one.
const GOOD: Duration = Duration::from_secs(10);

/// Says whether there is a connection now.
#[derive(Debug, Clone)]
pub struct Connected(watch::Sender<Option<String>>);

impl Connected {
    /// There is one.
    pub fn yes(&self) {
        self.0.send_replace(None);
    }
}

/// A kept connection; dropping it ends it.
#[derive(Debug)]
pub struct Kept {
    task: JoinHandle<()>,
    trouble: watch::Receiver<Option<String>>,
}

impl Kept {
    /// Calls `connect` again and again, with rests in between: it makes one connection, says [`Connected::yes`], and returns why the
    /// connection has ended or was not made.
    pub fn keep<F>(mut connect: impl FnMut(Connected) -> F + Send + 'static) -> Self
    where
        F: Future<Output = String> + Send,
    {
        let (tell, trouble) = watch::channel(None);
        let connected = Connected(tell.clone());
        let task = tokio::spawn(async move {
            let mut rest = FIRST_REST;
            loop {
                let begun = Instant::now();
                let ended = connect(connected.clone()).await;
                if begun.elapsed() > GOOD {
                    rest = FIRST_REST;
                }
                tell.send_replace(Some(ended));
                tokio::time::sleep(rest).await;
                rest = (rest * 2).min(LONGEST_REST);
            }
        });
        Self { task, trouble }
    }

    /// Why there is no connection now; nothing while there is one, or the first is being made.
    pub fn trouble(&self) -> Option<String> {
        self.trouble.borrow().clone()
    }

    /// Waits until that changes.
    pub async fn changed(&mut self) {
        if self.trouble.changed().await.is_err() {
            std::future::pending().await // the task never ends by itself
        }
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.task.abort(); // which ends the processes of the connection
    }
}

import io from "socket.io-client";

const socket = io("http://localhost:3000");

// Kullanıcı kimlik doğrulama
socket.emit("authenticate", { userId: user.id });

// İşlem başladığında
socket.on("generation_started", (data) => {
  showProgressBar(data);
});

// İşlem devam ediyor
socket.on("continue", (data) => {
  updateProgressBar(data);
});

// İşlem tamamlandığında
socket.on("generation_completed", (data) => {
  showCompletionMessage(data);
  hideProgressBar(data.generationId);
});

// Hata durumunda
socket.on("generation_failed", (data) => {
  showErrorMessage(data);
  hideProgressBar(data.generationId);
});

const showProgressBar = (data) => {
  const progressBar = document.createElement("div");
  progressBar.className = "progress-bar";
  progressBar.setAttribute("data-generation-id", data.generationId);
  progressBar.innerHTML = `
    <div class="progress" style="width: 0%"></div>
    <span class="message">${data.message}</span>
    <span class="status">${data.status}</span>
  `;

  document.getElementById("active-generations").appendChild(progressBar);
};

const updateProgressBar = (data) => {
  const progressBar = document.querySelector(
    `[data-generation-id="${data.generationId}"]`
  );
  if (progressBar) {
    const progress = progressBar.querySelector(".progress");
    const message = progressBar.querySelector(".message");
    const status = progressBar.querySelector(".status");

    progress.style.width = `${data.progress}%`;
    message.textContent = data.message;
    status.textContent = data.status;
  }
};

const hideProgressBar = (generationId) => {
  const progressBar = document.querySelector(
    `[data-generation-id="${generationId}"]`
  );
  if (progressBar) {
    progressBar.remove();
  }
};

/* Browsers start no worker on pages from a disk (file:). There a hidden frame stands in for the one that searches. */
if (location.protocol === "file:") {
  window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super()
      this.waiting = []
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.body.append(this.frame)
      const inside = this.frame.contentWindow
      inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
      const script = inside.document.createElement("script")
      script.onload = () => {
        this.postMessage = (data) => inside.dispatchEvent(new MessageEvent("message", { data }))
        this.waiting.forEach(this.postMessage)
      }
      script.src = url
      inside.document.body.append(script)
    }

    postMessage(data) {
      this.waiting.push(data) // until the script has been loaded
    }

    terminate() {
      this.frame.remove()
    }
  }
  window.Worker = window.IFrameWorker
}
